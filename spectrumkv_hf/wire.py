"""Caches as bytes: whole, in a file, or frame by frame while prefill still runs. See docs/wire-format.md.

A stream is a header frame, a frame for each layer, and an end frame. A buffer, a file and a socket carry the same
bytes.
"""

import hashlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedConfig

from spectrumkv_hf.cache import SpectrumCache
from spectrumkv_hf.identity import model_identity
from spectrumkv_hf.layer import SpectrumLayer
from spectrumkv_hf.policy import POLICIES, Policy
from spectrumkv_hf.wire_frame import (
    ALIGNMENT,
    MAX_LENGTH,
    Buffer,
    Fields,
    FrameHeader,
    Kind,
    Payload,
    WireError,
    as_tensor,
    read_payload,
)
from spectrumkv_hf.wire_layer import decode_layer, encode_layer, kind_of
from spectrumkv_kernels import CODECS

__all__ = [
    "Assembler",
    "Emitter",
    "FrameHeader",
    "FrameWriter",
    "Kind",
    "WireError",
    "deserialize",
    "frames",
    "header_frame",
    "layer_frame",
    "load",
    "save",
    "serialize",
]

MAX_BATCH = 1 << 20


# -- writing ----------------------------------------------------------------------------------------------------------


def frames(cache: SpectrumCache, stream: int = 0) -> Iterator[torch.Tensor]:
    """The frames of a cache in their order, each a uint8 tensor `[bytes]` on the cache's device.

    A layer is read when its frame is asked for; the cache must not change until the last.

    Args:
        cache: What to send; tiering that is still open is finished.
        stream: A number to tell streams apart, below 2^64.

    Raises:
        WireError: as of `SpectrumCache.serialize`.
    """
    writer = FrameWriter(cache, stream)
    yield writer.header()
    for index in range(len(cache.layers)):
        yield writer.layer(index)
    yield writer.end()


def header_frame(cache: SpectrumCache, stream: int = 0) -> torch.Tensor:
    """The frame that begins a stream."""
    return FrameWriter(cache, stream).header()


def layer_frame(cache: SpectrumCache, index: int, stream: int = 0) -> torch.Tensor:
    """The frame of layer `index`."""
    return FrameWriter(cache, stream).layer(index)


def serialize(cache: SpectrumCache, stream: int = 0, out: torch.Tensor | None = None) -> torch.Tensor:
    """All frames of a cache in one uint8 tensor `[bytes]` on its device; see `SpectrumCache.serialize`.

    Args:
        cache: What to write.
        stream: As of `frames`.
        out: Write into the beginning of this one, and return that part. Memory that has been in use takes bytes several
            times faster than new memory.

    Raises:
        WireError: as of `SpectrumCache.serialize`.
        ValueError: `out` is too small.
        TypeError: `out` is no contiguous uint8 tensor of one dimension.
    """
    writer = FrameWriter(cache, stream)
    payloads = [writer.header_payload(), *(writer.layer_payload(i) for i in range(len(cache.layers)))]
    end = writer.end_payload(0)  # as long as the one that follows
    size = sum(p.frame_bytes for p in [*payloads, end])
    if out is None:
        out = torch.empty(size, dtype=torch.uint8, device=writer.device)
    elif len(as_tensor(out)) < size or out.data_ptr() % ALIGNMENT or out.storage_offset() % ALIGNMENT:
        raise ValueError(f"out is {size} bytes or more at a multiple of {ALIGNMENT}, got {len(out)} bytes")
    out, at = out[:size], 0
    for index, payload in enumerate(payloads):
        writer.write(payload, out[at : at + payload.frame_bytes], Kind.LAYER if index else Kind.HEADER, index - 1)
        at += payload.frame_bytes
    writer.write(writer.end_payload(writer.digests()), out[at:], Kind.END)
    return out


def save(cache: SpectrumCache, path: str | os.PathLike[str]) -> None:
    """Write a cache into a file, frame by frame; see `SpectrumCache.save`."""
    path = os.path.abspath(path)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=f".{os.path.basename(path)}.")
    try:
        with os.fdopen(handle, "wb") as file:
            for frame in frames(cache):
                file.write(frame.cpu().numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


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
        stream: As of `frames`.

    Example:
        ```python
        with Emitter(cache, emit=lambda frame: socket.sendall(frame.numpy())):
            model(**inputs, past_key_values=cache)
        ```
    """

    def __init__(
        self,
        cache: SpectrumCache,
        emit: Callable[[torch.Tensor], None],
        tokens: int | None = None,
        stream: int = 0,
    ) -> None:
        self._cache, self._emit, self._tokens = cache, emit, tokens
        self._writer = FrameWriter(cache, stream)
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
        stream: As of `frames`.
    """

    def __init__(self, cache: SpectrumCache, stream: int = 0) -> None:
        self.cache, self.stream = cache, stream
        self._extent: tuple[int, int] | None = None
        self._digests: dict[int, int] = {}

    @property
    def device(self) -> torch.device:
        return next((t.device for layer in self.cache.layers for t in _tensors_of(layer)), torch.device("cpu"))

    @property
    def extent(self) -> tuple[int, int]:
        """Batch size and length of the cache."""
        if self._extent is None:
            filled = [layer for layer in self.cache.layers if next(_tensors_of(layer), None) is not None]
            batch = next(_tensors_of(filled[0])).shape[0] if filled else 0
            lengths = [length for layer in filled if (length := _length_of(layer)) is not None]
            self._extent = batch, lengths[0] if lengths else 0
            if self._extent[1] > MAX_LENGTH:
                raise WireError(f"{self._extent[1]} tokens; at most {MAX_LENGTH} can be serialised")
        return self._extent

    def header_payload(self) -> Payload:
        policy, (batch, length) = self.cache.policy, self.extent
        if POLICIES.get(policy.name) is not type(policy):
            raise WireError(f"{policy!r} can't be serialised: a receiver knows {', '.join(POLICIES)}")
        return Payload(
            {
                "policy": {"name": policy.name, **{f.name: getattr(policy, f.name) for f in fields(policy)}},
                "codec": self.cache.codec.name,
                "batch": batch,
                "length": length,
                "model": self.cache.identity,
                "layers": [kind_of(layer) for layer in self.cache.layers],
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

    def end_payload(self, digests: int) -> Payload:
        return Payload({"frames": len(self.cache.layers) + 2, "digest": f"{digests:016x}"})

    def digests(self) -> int:
        """Digest of the digests of all frames but the last."""
        return _digest_of([self._digests.get(i, 0) for i in range(len(self.cache.layers) + 1)])

    def write(self, payload: Payload, out: torch.Tensor, kind: Kind, layer: int = -1) -> None:
        index = len(self.cache.layers) + 1 if kind == Kind.END else layer + 1
        header = payload.write(out, kind, index, layer, self.stream)
        self._digests[index] = header.digest

    def _frame(self, payload: Payload, kind: Kind, layer: int = -1) -> torch.Tensor:
        device = next((t.device for t in payload.tensors.values()), self.device)
        out = torch.empty(payload.frame_bytes, dtype=torch.uint8, device=device)
        self.write(payload, out, kind, layer)
        return out

    def header(self) -> torch.Tensor:
        """The frame that begins the stream, uint8 `[bytes]`."""
        return self._frame(self.header_payload(), Kind.HEADER)

    def layer(self, index: int) -> torch.Tensor:
        """The frame of layer `index`."""
        return self._frame(self.layer_payload(index), Kind.LAYER, index)

    def end(self) -> torch.Tensor:
        """The frame that ends the stream."""
        return self._frame(self.end_payload(self.digests()), Kind.END)


def _digest_of(digests: list[int]) -> int:
    data = b"".join(n.to_bytes(8, "little") for n in digests)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _tensors_of(layer: Any) -> Iterator[torch.Tensor]:
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
    """Tokens that a layer has seen; None for a layer that does not count them."""
    filled = getattr(layer, "is_initialized", False) and hasattr(layer, "get_seq_length")
    return int(layer.get_seq_length()) if filled else None


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass
class _Stream:
    """What the header frame says."""

    cache: SpectrumCache
    batch: int
    length: int
    number: int


class Assembler:
    """Builds a cache from frames as they come in.

    Frames are accepted in their order only: header, layers from 0 on, end. After an error it accepts none.

    Args:
        config: Of the model that will use the cache.
        device: Where the cache will lie; None: where the frames are.
        limit: The longest frame to accept, in bytes; None: any.

    Example:
        ```python
        assembler = Assembler(model.config)
        for frame in connection:
            cache = assembler.feed(frame)  # None until the end frame
        ```
    """

    def __init__(
        self, config: PreTrainedConfig, device: torch.device | str | None = None, limit: int | None = None
    ) -> None:
        self._config, self._device, self._limit = config, device, limit
        self._stream: _Stream | None = None
        self._digests: list[int] = []
        self._offset = 0
        self._state = "open"

    @property
    def expected(self) -> str:
        """The frame that comes next, in words."""
        if self._state != "open":
            return "none"
        if self._stream is None:
            return "the header frame"
        layer = len(self._digests) - 1
        return f"layer {layer}" if layer < len(self._stream.cache.layers) else "the end frame"

    def feed(self, frame: Buffer) -> SpectrumCache | None:
        """Take a whole frame, as `frames` yields them.

        The cache keeps views of it where it begins at a multiple of 64 bytes and lies on the device.

        Returns:
            The cache at the end frame, before that None.

        Raises:
            WireError: the frame is damaged, not the expected one, or of another model.
            TypeError: it is no buffer.
        """
        data = as_tensor(frame)
        with self._located():
            header = FrameHeader.parse(data, self._limit)
        return self.add(header, data[FrameHeader.SIZE :])

    def add(self, header: FrameHeader, payload: Buffer) -> SpectrumCache | None:
        """As `feed`, for a header that is parsed and the `header.padded` bytes behind it."""
        data = as_tensor(payload)
        with self._located(header):
            if self._state != "open":
                raise WireError(f"no frame can be added: the stream is {self._state}")
            self._check_place(header)
            if data.data_ptr() % ALIGNMENT or data.storage_offset() % 8:
                data = data.clone()
            if self._device is not None:
                data = data.to(self._device)
            metadata, tensors = read_payload(header, data)
            if header.kind == Kind.HEADER:
                if tensors:
                    raise WireError("tensors in a frame that has none")
                self._stream = _begin(metadata, self._config, header.stream)
            elif header.kind == Kind.LAYER and self._stream:
                index, of = header.layer, self._stream
                decode_layer(of.cache.layers[index], index, metadata, tensors, of.batch, of.length)
            elif self._stream:
                if tensors:
                    raise WireError("tensors in a frame that has none")
                metadata.equal("frames", len(self._digests) + 1)
                metadata.equal("digest", f"{_digest_of(self._digests):016x}")
                metadata.done()
                self._state = "complete"
            self._digests.append(header.digest)
            self._offset += FrameHeader.SIZE + header.padded
        if self._state == "complete" and self._stream:
            cache, self._stream = self._stream.cache, None
            return cache
        return None

    def _check_place(self, header: FrameHeader) -> None:
        index = len(self._digests)
        if self._stream is None:
            kind, layer = Kind.HEADER, -1
        elif index <= len(self._stream.cache.layers):
            kind, layer = Kind.LAYER, index - 1
        else:
            kind, layer = Kind.END, -1
        if (header.kind, header.layer, header.index) != (kind, layer, index):
            what = "layer {0.layer}" if header.kind == Kind.LAYER else "a frame of kind {0.kind.name}"
            raise WireError(
                f"out of order: expected {self.expected} as frame {index}, got {what.format(header)} as frame "
                f"{header.index}"
            )
        if self._stream is not None and header.stream != self._stream.number:
            raise WireError(f"a frame of stream {header.stream} in stream {self._stream.number}")

    def _located(self, header: FrameHeader | None = None) -> "_Located":
        return _Located(self, header)

    def _fail(self) -> None:
        self._state, self._stream = "broken", None


class _Located:
    """Says in a `WireError` in which frame it arose, and ends the stream."""

    def __init__(self, assembler: Assembler, header: FrameHeader | None) -> None:
        self.assembler, self.header = assembler, header

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            return
        header, assembler = self.header, self.assembler
        where = assembler.expected if header is None else f"frame {header.index}"
        if header is not None and header.kind == Kind.LAYER:
            where = f"layer {header.layer}"
        offset = assembler._offset
        assembler._fail()
        if isinstance(error, WireError):
            raise WireError(f"{where}, at byte {offset} of the stream: {error}") from None


def _begin(metadata: Fields, config: PreTrainedConfig, number: int) -> _Stream:
    """An empty cache as the header frame describes it."""
    theirs = metadata.take("model", dict)
    ours = model_identity(config.get_text_config(decoder=True))
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise WireError(
                f"a cache of another model: {name} is {str(theirs.get(name))[:200]}, in config {ours.get(name)}"
            )
    codec = metadata.take("codec", str)
    if codec not in CODECS:
        raise WireError(f"unknown codec {codec[:80]!r}")
    batch, length = metadata.integer("batch", 0, MAX_BATCH), metadata.integer("length", 0, MAX_LENGTH)
    cache = SpectrumCache(config, policy=_policy(metadata.take("policy", dict)), codec=codec)
    kinds, own = metadata.take("layers", list), [kind_of(layer) for layer in cache.layers]
    if len(kinds) != len(own):
        raise WireError(f"{len(kinds)} layers, where the config has {len(own)}")
    for index, (kind, expected) in enumerate(zip(kinds, own, strict=True)):
        if kind != expected:
            raise WireError(f"layer {index} is {str(kind)[:80]!r}, where the config has {expected!r}")
    metadata.done()
    return _Stream(cache, batch, length, number)


POLICY_TYPES: dict[str, tuple[type, ...]] = {
    "budget": (float, int),
    "sinks": (int,),
    "recent_window": (int,),
    "importance": (str,),
    "decay": (float, int),
    "scope": (str,),
    "seed": (int,),
    "probe_passed": (bool, type(None)),
}


def _policy(values: dict[str, Any]) -> Policy:
    given = Fields(values)
    name = given.take("name", str)
    if name not in POLICIES:
        raise WireError(f"unknown policy {name[:80]!r}")
    options = {f.name: given.take(f.name, *POLICY_TYPES[f.name]) for f in fields(POLICIES[name])}
    given.done()
    try:
        return POLICIES[name](**options)
    except ValueError as error:
        raise WireError(str(error)[:400]) from None


def deserialize(buffer: Buffer, config: PreTrainedConfig, device: torch.device | str | None = None) -> SpectrumCache:
    """The cache in a buffer; see `SpectrumCache.deserialize`."""
    data = as_tensor(buffer)
    assembler = Assembler(config, device)
    at = 0
    cache = None
    while cache is None:
        left = data[at:]
        with assembler._located():
            if not len(left):
                raise WireError("the buffer ends here")
            header = FrameHeader.parse(left)
            end = FrameHeader.SIZE + header.padded
            if len(left) < end:
                raise WireError(f"truncated: a frame of {end} bytes, {len(left)} are left")
        cache = assembler.add(header, left[FrameHeader.SIZE : end])
        at += end
    if at != len(data):
        raise WireError(f"{len(data) - at} bytes behind the end frame, from byte {at} on")
    return cache


def load(
    path: str | os.PathLike[str], config: PreTrainedConfig, device: torch.device | str | None = None
) -> SpectrumCache:
    """The cache in a file; see `SpectrumCache.load`."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise WireError(f"{os.fspath(path)!r} is empty")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private: nothing reaches the file
    return deserialize(mapped, config, device)
