"""Writing caches: frame by frame, into one buffer or file, or while prefill still runs."""

import contextlib
import mmap
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import fields
from types import TracebackType
from typing import Any

import torch

from spectrumkv_hf.policy import POLICIES
from spectrumkv_hf.support.whole_file import whole_file
from spectrumkv_hf.tiered.cache import TieredCache
from spectrumkv_hf.tiered.layer import SpectrumLayer
from spectrumkv_hf.tiered.mixed_layers import CrossAttentionLayer
from spectrumkv_hf.wire.frame import (
    ALIGNMENT,
    FrameHeader,
    Kind,
    WireError,
    as_tensor,
    digest,
    digest_of_digests,
    hashed,
    put,
)
from spectrumkv_hf.wire.layer import encode_layer, kind_of
from spectrumkv_hf.wire.mac import FrameMacs
from spectrumkv_hf.wire.payload import MAX_LENGTH, Payload, check_length, write_payloads

HUGE = 1 << 23
"""Bytes from which on memory is asked for in huge pages, of 2 MiB mostly."""


def frames(cache: TieredCache, stream: int | None = None, key: bytes | None = None) -> Iterator[torch.Tensor]:
    """The frames of a cache in their order, each a uint8 tensor `[bytes]` on the cache's device.

    A layer is read when its frame is asked for; the cache must not change until the last.

    Args:
        cache: What to send; tiering that is still open is finished.
        stream: A number to tell streams apart, below 2^64; None: 0, and with a key one at random.
        key: 16 to 64 bytes, by which each frame gets a MAC; None: they have none.

    Raises:
        WireError: as in `SpectrumCache.serialize`.
        ValueError: the key is none.
    """
    writer = FrameWriter(cache, stream, key)
    yield writer.header()
    for index in range(len(cache.layers)):
        yield writer.layer(index)
    yield writer.end()


def layer_frame(cache: TieredCache, index: int, stream: int = 0) -> torch.Tensor:
    """The frame of layer `index`."""
    return FrameWriter(cache, stream).layer(index)


def serialize(
    cache: TieredCache, stream: int | None = None, out: torch.Tensor | None = None, key: bytes | None = None
) -> torch.Tensor:
    """All frames of a cache in one uint8 tensor `[bytes]` on its device; see `SpectrumCache.serialize`.

    Args:
        cache: What to write.
        stream: As in `frames`.
        out: Write into the beginning of this one, and return that part. Memory that has been in use takes bytes
            faster than new memory.
        key: As in `frames`.

    Raises:
        WireError: as in `SpectrumCache.serialize`.
        ValueError: `out` is too small, or the key is none.
        TypeError: `out` is no contiguous uint8 tensor of one dimension.
    """
    writer = FrameWriter(cache, stream, key)
    macs = writer.macs
    payloads = [writer.header_payload(), *(writer.layer_payload(i) for i in range(len(cache.layers)))]
    size = sum(
        p.frame_bytes + macs.size for p in [*payloads, writer.end_payload([])]
    )  # that one is as long as the one that follows
    check_length(writer.extent[1], size)
    if out is None:
        out = _fresh(size, writer.device)
    elif len(as_tensor(out)) < size or out.data_ptr() % ALIGNMENT or out.storage_offset() % ALIGNMENT:
        raise ValueError(f"out is {size} bytes or more at a multiple of {ALIGNMENT}, got {len(out)} bytes")
    out = out[:size]
    digests = hashed(write_payloads(payloads, out, apart=macs.size))
    payloads.append(end := writer.end_payload(digests))
    digests.append(digest(as_tensor(end.head)))
    pieces, at = [(size - macs.size - len(end.head), end.head)], 0
    for index, (payload, check) in enumerate(zip(payloads, digests, strict=True)):
        kind, layer = writer.place(index)
        header = FrameHeader(kind, index, layer, payload.length, check, writer.stream, macs.key_id)
        written = out[at + FrameHeader.SIZE : at + payload.frame_bytes]
        pieces += macs.pieces(header, as_tensor(end.head) if payload is end else written, at)
        at += payload.frame_bytes + macs.size
    put(out, pieces)
    return out


def _fresh(size: int, device: torch.device) -> torch.Tensor:
    """New memory, uint8 `[size]`: where the system can, in pages so large that touching them first costs little."""
    if device.type == "cpu" and size >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(pages, dtype=torch.uint8)
    return torch.empty(size, dtype=torch.uint8, device=device)


def save(cache: TieredCache, path: str | os.PathLike[str], key: bytes | None = None) -> None:
    """Write a cache into a file, frame by frame; see `SpectrumCache.save`."""
    with whole_file(path) as file:
        for frame in frames(cache, key=key):
            file.write(frame.cpu().numpy().data)


class Emitter:
    """Emits the frames of a cache while a forward fills it: each layer's as soon as the layer is final.

    Use it as a context around the forward; leaving it emits what is left. After an exception inside nothing more is
    emitted. Frames come in order: those of layers that don't announce themselves with the next layer that does.

    Args:
        cache: The cache that the forward will get.
        emit: Takes a frame, uint8 `[bytes]` on the cache's device, a tensor of its own. Called from the model's
            forward, out of which comes what it raises.
        tokens: Length of the cache at which layers are final; for a prefill in chunks, that of the whole prompt.
            None: the first forward's.
        stream, key: As in `frames`.

    Example:
        ```python
        with Emitter(cache, emit=lambda frame: socket.sendall(frame.numpy())):
            model(**inputs, **cache_argument(cache))
        ```
    """

    def __init__(
        self,
        cache: TieredCache,
        emit: Callable[[torch.Tensor], None],
        tokens: int | None = None,
        stream: int | None = None,
        key: bytes | None = None,
    ) -> None:
        self._cache, self._emit, self._tokens = cache, emit, tokens
        self._writer = FrameWriter(cache, stream, key)
        self._next = -1  # the header

    def __enter__(self) -> "Emitter":
        self._remove = self._cache.on_layer(self._final)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._remove()
        if kind is None:
            self._advance(len(self._cache.layers))
            self._emit(self._writer.end())

    def _final(self, index: int) -> None:
        if self._tokens is None or self._cache.layers[index].get_seq_length() == self._tokens:
            self._advance(index + 1)

    def _advance(self, stop: int) -> None:
        """Emit the frames before layer `stop`."""
        while self._next < stop:
            index, self._next = self._next, self._next + 1
            self._emit(self._writer.header() if index < 0 else self._writer.layer(index))


class FrameWriter:
    """Builds the frames of one stream, for a sender with an order of work of its own.

    Batch size and length are those of the cache when the first frame is built. `end` needs all other frames to have
    been built by the same writer.

    Args:
        cache: What to send.
        stream, key: As in `frames`.
    """

    def __init__(self, cache: TieredCache, stream: int | None = None, key: bytes | None = None) -> None:
        self.cache, self.macs = cache, FrameMacs(key)
        self.stream = (0 if key is None else secrets.randbits(63)) if stream is None else stream
        self._extent: tuple[int, int] | None = None
        self._digests: dict[int, int] = {}
        self._bytes = 0

    @property
    def device(self) -> torch.device:
        return next((t.device for layer in self.cache.layers for t in _batched_tensors(layer)), torch.device("cpu"))

    @property
    def extent(self) -> tuple[int, int]:
        """Batch size and length of the cache."""
        if self._extent is None:
            filled = [layer for layer in self.cache.layers if next(_batched_tensors(layer), None) is not None]
            batch = next(_batched_tensors(filled[0])).shape[0] if filled else 0
            lengths = [length for layer in filled if (length := _length_of(layer)) is not None]
            self._extent = batch, lengths[0] if lengths else 0
            if self._extent[1] > MAX_LENGTH:
                raise WireError(f"{self._extent[1]} tokens; at most {MAX_LENGTH} can be serialised")
        return self._extent

    def header_payload(self) -> Payload:
        self.cache.check_whole()
        policy, (batch, length) = self.cache.policy, self.extent
        if POLICIES.get(policy.name) is not type(policy):
            raise WireError(f"{policy!r} can't be serialised: a receiver knows {', '.join(POLICIES)}")
        settings = {f.name: getattr(policy, f.name) for f in fields(policy)}
        if not settings["floors"]:  # readers that came before them refuse the field
            del settings["floors"]
        return Payload(
            {
                "policy": {"name": policy.name, **settings},
                "codec": self.cache.codec.name,
                "batch": batch,
                "length": length,
                "model": self.cache.identity,
                "layers": [kind_of(layer) for layer in self.cache.layers],
                **({"weights": self.cache.weights} if self.cache.weights else {}),
            }
        )

    def layer_payload(self, index: int) -> Payload:
        layer = self.cache.layers[index]
        batch, length = self.extent
        metadata, tensors = encode_layer(layer, index)
        for tensor in list(tensors.values())[:1]:
            own = length if _length_of(layer) is None else _length_of(layer)
            if (tensor.shape[0], own) != (batch, length):
                raise WireError(
                    f"layer {index} holds {own} tokens of batch {tensor.shape[0]}, others {length} of {batch}: "
                    "serialise between forwards, or prefill in one with an Emitter"
                )
        return Payload(metadata, tensors)

    def end_payload(self, digests: list[int]) -> Payload:
        """Of the digests of all other frames."""
        return Payload({"frames": len(self.cache.layers) + 2, "digest": f"{digest_of_digests(digests):016x}"})

    def place(self, index: int) -> tuple[Kind, int]:
        """Kind and layer of a frame."""
        if index == 0:
            return Kind.HEADER, -1
        return (Kind.LAYER, index - 1) if index <= len(self.cache.layers) else (Kind.END, -1)

    def _frame(self, payload: Payload, index: int) -> torch.Tensor:
        device = next((t.device for t in payload.tensors.values()), self.device)
        kind, layer = self.place(index)
        header, out = payload.frame(kind, index, layer, self.stream, self.macs, device)
        self._digests[index] = header.digest
        self._bytes += len(out)
        return out

    def header(self) -> torch.Tensor:
        """The frame that begins the stream, uint8 `[bytes]`."""
        return self._frame(self.header_payload(), 0)

    def layer(self, index: int) -> torch.Tensor:
        """The frame of layer `index`."""
        return self._frame(self.layer_payload(index), index + 1)

    def end(self) -> torch.Tensor:
        """The frame that ends the stream."""
        frames = len(self.cache.layers) + 1
        payload = self.end_payload([self._digests.get(i, 0) for i in range(frames)])
        check_length(self.extent[1], self._bytes + payload.frame_bytes + self.macs.size)
        return self._frame(payload, frames)


def _batched_tensors(layer: Any) -> Iterator[torch.Tensor]:
    """Tensors of a layer whose first dimension is the batch."""
    if isinstance(layer, SpectrumLayer):
        if layer.is_initialized:
            yield layer.store.tail[0]
        return
    sides = [getattr(layer, name, None) for name in ("keys", "conv_states", "recurrent_states")]
    for side in sides:
        for tensor in side.values() if isinstance(side, dict) else [side]:
            if isinstance(tensor, torch.Tensor):
                yield tensor


def _length_of(layer: Any) -> int | None:
    """Tokens that a layer has seen; None for a layer that does not count them, or others than the text's."""
    if isinstance(layer, CrossAttentionLayer):
        return None
    filled = getattr(layer, "is_initialized", False) and hasattr(layer, "get_seq_length")
    return int(layer.get_seq_length()) if filled else None
