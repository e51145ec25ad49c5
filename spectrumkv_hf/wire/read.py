"""Reading caches: from frames as they come in, from one buffer or file."""

import contextlib
import os
import re
from dataclasses import dataclass, fields
from mmap import ACCESS_COPY
from mmap import mmap as Mapping
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from transformers import PreTrainedConfig

from spectrumkv_hf.policy import POLICIES, Policy
from spectrumkv_hf.support.whole_file import open_regular
from spectrumkv_hf.tiered.cache import TieredCache
from spectrumkv_hf.tiered.identity import model_identity, weights_fingerprint
from spectrumkv_hf.wire.frame import (
    ALIGNMENT,
    Buffer,
    FrameHeader,
    Kind,
    Place,
    WireError,
    as_tensor,
    digest_of_digests,
    host_bytes,
    shown,
)
from spectrumkv_hf.wire.layer import decode_layer, kind_of
from spectrumkv_hf.wire.mac import FrameMacs, check_key
from spectrumkv_hf.wire.payload import BEGINNING, MAX_LENGTH, Fields, Later, check_length, read_payload
from spectrumkv_kernels import CODECS

BEFORE_HYBRID = {
    "HybridSpectrumLayer": "LinearAttentionAndFullAttentionLayer",
    "HybridSlidingSpectrumLayer": "LinearAttentionAndSlidingWindowAttentionLayer",
}
"""What hybrid layers were in caches written before they were tiered."""

C = TypeVar("C", bound=TieredCache)

MAX_BATCH = 1 << 20
MOST = 255
"""Frames whose beginnings are read ahead."""


@dataclass
class _Stream(Generic[C]):
    """What the header frame says."""

    cache: C
    batch: int
    length: int
    number: int


class Assembler(Generic[C]):
    """Builds a cache from frames as they come in.

    Frames are accepted in their order only: header, layers from 0 on, end. After an error it accepts none.

    Args:
        cache_class: What it builds, `SpectrumCache` or the class below it.
        config: Of the model that will use the cache.
        device: Where the cache will lie; None: where the frames are.
        limit: The longest frame to accept, in bytes; None: any.
        model: That model, if its weights are to be compared with those that made the cache.
        key: 16 to 64 bytes, by which every frame has to have a MAC; None: frames with one are refused.

    Raises:
        ValueError: the key is none.

    Example:
        ```python
        assembler = Assembler(SpectrumCache, model.config)
        for frame in connection:
            cache = assembler.feed(frame)  # None until the end frame
        ```
    """

    def __init__(
        self,
        cache_class: type[C],
        config: PreTrainedConfig,
        device: torch.device | str | None = None,
        limit: int | None = None,
        model: torch.nn.Module | None = None,
        key: bytes | None = None,
    ) -> None:
        self._macs = FrameMacs(key)
        self._weights = None if model is None else weights_fingerprint(model)
        self._config, self._device, self._limit = config, device, limit
        self._cache_class = cache_class
        self._stream: _Stream[C] | None = None
        self._digests: list[int] = []
        self._offset = 0
        self._state = "open"

    def use_key(self, key: bytes | None) -> None:
        """Go by another key; before the first frame."""
        self._macs = FrameMacs(key)

    @property
    def expected(self) -> Place | None:
        """The frame that comes next; None where none is accepted any more."""
        if self._state != "open":
            return None
        return Place.of(len(self._digests), 0 if self._stream is None else len(self._stream.cache.layers))

    def feed(self, frame: Buffer) -> C | None:
        """Take a whole frame, as `frames` yields them.

        The cache keeps views of it where it begins at a multiple of 64 bytes and lies on the device.

        Returns:
            The cache at the end frame, before that None.

        Raises:
            WireError: the frame is damaged, not the expected one, or of another model, or its MAC is wrong.
            KeyRefused, one of them: there is a key and no MAC of it, or no key and a MAC.
            TypeError: it is no buffer.
        """
        data = as_tensor(frame)
        with self._located():
            header = FrameHeader.parse(data, self._limit)
        return self.add(header, data[FrameHeader.SIZE :])

    def add(self, header: FrameHeader, payload: Buffer) -> C | None:
        """As `feed`, for a header that is parsed and the `header.rest` bytes behind it."""
        return self._add(header, as_tensor(payload))

    def _add(self, header: FrameHeader, data: torch.Tensor, begin: bytes = b"", later: Later | None = None) -> C | None:
        """As `add`; `begin` and `later` as in `read_payload`. With `later` the cache is not to be trusted yet."""
        with self._located(header):
            if self._state != "open":
                raise WireError(f"no frame can be added: the stream is {self._state}")
            self._macs.check_key(header)
            self._check_place(header)
            if data.data_ptr() % ALIGNMENT or data.storage_offset() % 8:
                data = data.clone()
            data = self._macs.check(header, data)
            if header.has_mac:
                begin = b""  # which was read before the check
            if self._device is not None:
                data = data.to(self._device)
            metadata, tensors = read_payload(header, data, begin, later)
            if header.kind == Kind.HEADER:
                if tensors:
                    raise WireError("tensors in a frame that has none")
                self._stream = _begin(self._cache_class, metadata, self._config, self._weights, header.stream)
            elif header.kind == Kind.LAYER and self._stream:
                index, of = header.layer, self._stream
                checks = None if later is None else later.checks
                decode_layer(of.cache.layers[index], index, metadata, tensors, of.batch, of.length, checks)
            elif self._stream:
                if tensors:
                    raise WireError("tensors in a frame that has none")
                metadata.equal("frames", len(self._digests) + 1)
                metadata.equal("digest", f"{digest_of_digests(self._digests):016x}")
                metadata.done()
                check_length(self._stream.length, self._offset + FrameHeader.SIZE + header.rest)
                self._state = "complete"
            self._digests.append(header.digest)
            self._offset += FrameHeader.SIZE + header.rest
        if self._state == "complete" and self._stream:
            cache, self._stream = self._stream.cache, None
            return cache
        return None

    def _check_place(self, header: FrameHeader) -> None:
        index = len(self._digests)
        if (header.place, header.index) != (self.expected, index):
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
        if header is None:
            where = str(assembler.expected)
        else:
            where = str(header.place) if header.kind == Kind.LAYER else f"frame {header.index}"
        offset = assembler._offset
        assembler._fail()
        if isinstance(error, WireError):
            raise type(error)(f"{where}, at byte {offset} of the stream: {error}", located=True) from None


def _begin(
    cache_class: type[C], metadata: Fields, config: PreTrainedConfig, weights: str | None, number: int
) -> _Stream[C]:
    """An empty cache as the header frame describes it."""
    theirs = metadata.take("model", dict)
    ours = model_identity(config.get_text_config(decoder=True))
    if theirs != ours:
        raise WireError(f"a cache of another model: {_difference(theirs, ours)}")
    made_by = metadata.take("weights", str) if "weights" in metadata else None
    if made_by is not None and not re.fullmatch("[0-9a-f]{32}", made_by):
        raise WireError(f"weights are named by 32 hex digits, got {shown(made_by)}")
    if None not in (made_by, weights) and made_by != weights:
        raise WireError(
            f"a cache of other weights: made by {made_by}, the model's are {weights}. Another checkpoint, adapter, "
            "dtype or quantisation has other weights; without model= they are not compared"
        )
    codec = metadata.take("codec", str)
    if codec not in CODECS:
        raise WireError(f"unknown codec {shown(codec)}")
    batch, length = metadata.integer("batch", 0, MAX_BATCH), metadata.integer("length", 0, MAX_LENGTH)
    policy = _policy(metadata.take("policy", dict))
    try:
        cache = cache_class(config, policy=policy, codec=codec)
    except ValueError as error:  # the policy names layers that the config does not have
        raise WireError(str(error)[:400]) from None
    kinds, own = metadata.take("layers", list), [kind_of(layer) for layer in cache.layers]
    if len(kinds) != len(own):
        raise WireError(f"{len(kinds)} layers, where the config has {len(own)}")
    cache.weights = made_by
    for index, (kind, expected) in enumerate(zip(kinds, own, strict=True)):
        if kind == BEFORE_HYBRID.get(expected):
            cache.use_stock(index)
        elif kind != expected and (kind, expected) != ("SpectrumLayer", "CrossAttentionLayer"):
            raise WireError(f"layer {index} is {shown(kind)}, where the config has {expected!r}")
    metadata.done()
    return _Stream(cache, batch, length, number)


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Of two unequal objects, the first field that differs, in words; of objects in them, the field there."""
    path: list[str] = []
    mine: Any = ours
    other: Any = theirs
    while isinstance(other, dict) and isinstance(mine, dict):
        name = min(n for n in other.keys() | mine.keys() if other.get(n) != mine.get(n))
        path.append(shown(name)[1:-1])
        other, mine = other.get(name), mine.get(name)
    return f"{'.'.join(path)} is {shown(other)}, in config {shown(mine)}"


POLICY_TYPES: dict[str, tuple[type, ...]] = {
    "budget": (float, int),
    "sinks": (int,),
    "recent_window": (int,),
    "importance": (str,),
    "decay": (float, int),
    "scope": (str,),
    "seed": (int,),
    "floors": (list,),
    "layers": (list,),
    "probe_passed": (bool, type(None)),
}


def _policy(values: dict[str, Any]) -> Policy:
    given = Fields(values)
    name = given.take("name", str)
    if name not in POLICIES:
        raise WireError(f"unknown policy {shown(name)}")
    wanted = [f.name for f in fields(POLICIES[name]) if f.name != "floors" or f.name in given]
    options = {name: given.take(name, *POLICY_TYPES[name]) for name in wanted}
    given.done()
    floors = options.get("floors", [])
    if any(type(pair) is not list or [type(item) for item in pair] != [int, str] for pair in floors):
        raise WireError(f"floors are pairs of a layer and a tier, got {shown(floors)}")
    if not all(map(_is_planned, options.get("layers", []))):
        raise WireError(f"layers are pairs of a layer and its shares, got {shown(options['layers'])}")
    try:
        return POLICIES[name](**options)
    except ValueError as error:
        raise WireError(str(error)[:400]) from None  # of numbers, and of text that its `repr` shows


def _is_planned(pair: Any) -> bool:
    """Whether this is a layer with numbers, as the plan of `calibrated` has them."""
    whole = type(pair) is list and [type(item) for item in pair] == [int, list]
    return whole and all(type(share) in (int, float) for share in pair[1])


def deserialize(
    cache_class: type[C],
    buffer: Buffer,
    config: PreTrainedConfig,
    device: torch.device | str | None = None,
    model: torch.nn.Module | None = None,
    key: bytes | None = None,
) -> C:
    """The cache in a buffer; see `SpectrumCache.deserialize`."""
    data = as_tensor(buffer)
    if key is not None and isinstance(buffer, Mapping):
        data = data.clone()  # others may write into the file between check and use
    if torch.device(device or data.device).type != "cpu":
        later = Later()
        with contextlib.suppress(WireError):  # which says neither what came first nor where
            cache = _read(data, Assembler(cache_class, config, device, model=model, key=key), later)
            later.settle()
            return cache
    return _read(data, Assembler(cache_class, config, device, model=model, key=key))


def _read(data: torch.Tensor, assembler: Assembler[C], later: Later | None = None) -> C:
    """The cache of a whole stream; with `later`, which takes the checks, it does not wait for the device."""
    beginnings = Beginnings(data)
    at = 0
    cache = None
    while cache is None:
        with assembler._located():
            if at == len(data):
                raise WireError("the buffer ends here")
            begin = beginnings.at(at)
            header = FrameHeader.parse(begin)
            end = at + FrameHeader.SIZE + header.rest
            if len(data) < end:
                raise WireError(f"truncated: a frame of {end - at} bytes, {len(data) - at} are left")
        payload = data[at + FrameHeader.SIZE : end]
        cache = assembler._add(header, payload, begin[FrameHeader.SIZE : end - at], later)
        beginnings.length = end - at if header.kind == Kind.LAYER else 0
        at = end
    if at != len(data):
        raise WireError(f"{len(data) - at} bytes behind the end frame, from byte {at} on")
    return cache


class Beginnings:
    """The first bytes of the frames in a buffer, several of which come from a device at once.

    Layers' frames are mostly of one length, so that it can be guessed where those behind a frame begin. What is read at
    once is no more than what is left of the buffer.

    Attributes:
        length: Of the last layer's frame, in bytes; 0 where there was none.
    """

    def __init__(self, data: torch.Tensor) -> None:
        self._data, self._read, self.length = data, dict[int, bytes](), 0

    def at(self, start: int) -> bytes:
        """`BEGINNING` bytes from `start` on, or those up to the end of the buffer."""
        if self._data.is_cpu:
            return host_bytes(self._data[start : start + BEGINNING])
        if start not in self._read:
            size, step = min(BEGINNING, len(self._data) - start), self.length
            more = min((len(self._data) - start - size) // max(step, size), MOST) if step else 0
            raw = host_bytes(self._data[start:].as_strided((more + 1, size), (step, 1)))
            self._read = {start + i * step: raw[i * size : (i + 1) * size] for i in range(more + 1)}
        return self._read[start]


def load(
    cache_class: type[C],
    path: str | os.PathLike[str],
    config: PreTrainedConfig,
    device: torch.device | str | None = None,
    mmap: bool = True,
    model: torch.nn.Module | None = None,
    key: bytes | None = None,
) -> C:
    """The cache in a file; see `SpectrumCache.load`."""
    check_key(key)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise WireError(f"{os.fspath(path)!r} is empty")
        data: Buffer
        if mmap and key is None:  # what is checked by a key has to be what is used
            data = Mapping(file.fileno(), 0, access=ACCESS_COPY)  # private: nothing reaches the file
        else:
            data = torch.empty(size, dtype=torch.uint8)
            data = data[: file.readinto(data.numpy().data)]
    return deserialize(cache_class, data, config, device, model, key)
