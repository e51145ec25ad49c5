"""Frames: a fixed header with checksums, then a payload in the safetensors layout. See docs/wire-format.md."""

import hashlib
import json
import math
import mmap
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NoReturn

import torch

Buffer = bytes | bytearray | memoryview | mmap.mmap | torch.Tensor
"""What can be read: anything with the buffer protocol , or a uint8 tensor `[bytes]` on any device."""

MAGIC = b"SPECTRKV"
VERSION = 1
ALIGNMENT = 64
"""Frames, and the tensors' part of a payload, begin at multiples of this many bytes."""
MAX_JSON = 1 << 20
"""Bytes of JSON in a payload."""
MAX_LENGTH = 1 << 24
"""Tokens of a sequence: positions size the tables of cos and sin that reading a cache needs."""
MAX_INTEGER = 1 << 48

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I64": torch.int64,
}
"""Tensor types by their safetensors names."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_OURS = "spectrumkv"


class WireError(ValueError):
    """Bytes that are no sound cache, or not this model's; the message says what is wrong, and where."""


class Kind(IntEnum):
    """What a frame carries."""

    HEADER = 1
    LAYER = 2
    END = 3
    REQUEST = 4
    PATCH = 5


@dataclass(frozen=True)
class FrameHeader:
    """The first 64 bytes of a frame.

    Attributes:
        kind: What the payload is.
        index: Place of the frame in its stream, from 0.
        layer: The layer, or -1 where the frame belongs to none.
        length: Bytes of the payload, without the zeros that pad it.
        digest: `digest` of the padded payload.
        stream: A number chosen by the sender, the same in all frames of a stream.
    """

    SIZE = 64
    _LAYOUT = struct.Struct("<8sHHIiIQQQ12s")  # and the CRC-32 of these 60 bytes

    kind: Kind
    index: int
    layer: int
    length: int
    digest: int
    stream: int = 0

    @property
    def padded(self) -> int:
        """Bytes that follow the header."""
        return padded(self.length)

    def pack(self) -> bytes:
        """The 64 bytes."""
        fields = (self.kind, self.index, self.layer, 0, self.length, self.digest, self.stream, bytes(12))
        head = self._LAYOUT.pack(MAGIC, VERSION, *fields)
        return head + struct.pack("<I", zlib.crc32(head))

    @classmethod
    def parse(cls, data: Buffer, limit: int | None = None) -> "FrameHeader":
        """Read and check the first 64 bytes of `data`.

        Args:
            data: A frame, or its beginning.
            limit: The longest padded payload to accept, in bytes; None: any.

        Raises:
            WireError: too few bytes, another format or version, damage, a longer payload.
        """
        raw = host_bytes(as_tensor(data)[: cls.SIZE])
        if len(raw) < cls.SIZE:
            raise WireError(f"a frame header has {cls.SIZE} bytes, got {len(raw)}")
        magic, version, kind, index, layer, flags, length, check, stream, reserved = cls._LAYOUT.unpack(raw[:-4])
        if magic != MAGIC:
            raise WireError(f"no frame: begins with {magic!r}, not {MAGIC!r}")
        if version != VERSION:
            raise WireError(f"format version {version}; this release reads version {VERSION}")
        if zlib.crc32(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
            raise WireError("damaged frame header: its CRC-32 is wrong")
        if kind not in Kind.__members__.values():
            raise WireError(f"unknown kind of frame: {kind}")
        if flags or any(reserved):
            raise WireError("reserved fields of the frame header are not 0")
        if limit is not None and padded(length) > limit:
            raise WireError(f"a payload of {length} bytes, more than the limit of {limit}")
        return cls(Kind(kind), index, layer, length, check, stream)


def padded(length: int) -> int:
    """`length` rounded up to the alignment."""
    return -(-length // ALIGNMENT) * ALIGNMENT


def as_tensor(data: Buffer) -> torch.Tensor:
    """The bytes as a uint8 tensor `[bytes]`, without a copy.

    Raises:
        TypeError: neither bytes nor a one-dimensional contiguous uint8 tensor.
    """
    if isinstance(data, torch.Tensor):
        if data.dtype != torch.uint8 or data.dim() != 1 or not data.is_contiguous():
            raise TypeError(
                f"a buffer is bytes or a contiguous uint8 tensor of one dimension, got {data.dtype} of shape "
                f"{tuple(data.shape)}"
            )
        return data
    try:
        view = memoryview(data).cast("B")
    except TypeError:
        raise TypeError(f"a buffer is bytes or a uint8 tensor, got {type(data).__name__}") from None
    if not len(view):
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():  # of read-only memory, into which nothing here writes
        warnings.simplefilter("ignore")
        return torch.frombuffer(view, dtype=torch.uint8)


def host_bytes(data: torch.Tensor) -> bytes:
    """A uint8 tensor's bytes."""
    return data.cpu().numpy().tobytes()


# -- checksum ---------------------------------------------------------------------------------------------------------

ROW = 1024
"""64-bit words in a row of the digest."""
_STEP = 128
"""Rows that are summed at a time."""


def _splitmix(count: int) -> Iterator[int]:
    """Odd 64-bit numbers from SplitMix64 with seed 0, as signed integers."""
    mask, state = (1 << 64) - 1, 0
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z = (z ^ (z >> 31)) | 1
        yield z - (1 << 64) if z >> 63 else z


_WEIGHTS = torch.tensor(list(_splitmix(ROW)), dtype=torch.int64)


def digest(payload: torch.Tensor) -> int:
    """Checksum of a padded payload, 64 bits: a vectorised one, so that it costs little on CPUs and GPUs.

    The payload, extended by zeros to whole rows of 1024 little-endian 64-bit words, gives a weighted sum of each row
    and the sum of each column, all modulo 2^64; their BLAKE2b is the digest. It detects damage, not forgery.

    Args:
        payload: uint8 `[bytes]`, a multiple of 8 of them.
    """
    words = payload.view(torch.int64)
    weights = _WEIGHTS.to(payload.device)
    whole = words.numel() // ROW * ROW
    rows = words[:whole].view(-1, ROW)
    columns = torch.zeros(ROW, dtype=torch.int64, device=payload.device)
    sums = []
    if payload.device.type == "cpu":
        # Products of integer matrices exist on CPUs only. In steps that fit the processor's cache memory is read once.
        ones = torch.ones(_STEP, dtype=torch.int64)
        for part in rows.split(_STEP):
            sums.append(torch.mv(part, weights))
            columns.addmv_(part.t(), ones[: len(part)])
    else:
        for part in rows.split(64 * _STEP):
            sums.append((part * weights).sum(1))
            columns += part.sum(0)
    if whole < words.numel():
        rest = words[whole:]
        sums.append((rest * weights[: len(rest)]).sum(0, keepdim=True))
        columns[: len(rest)] += rest
    state = hashlib.blake2b(host_bytes(torch.cat((*sums, columns)).view(torch.uint8)), digest_size=8)
    return int.from_bytes(state.digest(), "little")


# -- payloads ---------------------------------------------------------------------------------------------------------


class Payload:
    """A payload to be written: metadata and tensors, laid out as safetensors asks.

    Tensors are ordered by the largest power of two that divides their bytes, so that each is aligned without holes.

    Args:
        metadata: What JSON can hold.
        tensors: By name; any strides, all on one device.
    """

    def __init__(self, metadata: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        def alignment(item: tuple[str, torch.Tensor]) -> int:
            return min(item[1].nbytes & -item[1].nbytes or ALIGNMENT, ALIGNMENT)

        self.tensors = dict(sorted((tensors or {}).items(), key=alignment, reverse=True))
        described: dict[str, Any] = {_METADATA: {_OURS: _dump(metadata)}}
        end = 0
        for name, tensor in self.tensors.items():
            begin, end = end, end + tensor.nbytes
            shape = list(tensor.shape)
            described[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
        text = _dump(described).encode()
        text += b" " * (padded(8 + len(text)) - 8 - len(text))
        if len(text) > MAX_JSON:
            raise WireError(f"{len(text)} bytes of metadata; at most {MAX_JSON} are allowed")
        self.head = struct.pack("<Q", len(text)) + text
        self.length = len(self.head) + end

    @property
    def frame_bytes(self) -> int:
        """Bytes of the frame: header, payload, padding."""
        return FrameHeader.SIZE + padded(self.length)

    def write(self, out: torch.Tensor, kind: Kind, index: int, layer: int = -1, stream: int = 0) -> FrameHeader:
        """Write the frame into `out`, uint8 `[frame_bytes]` on the tensors' device."""
        payload = out[FrameHeader.SIZE :]
        _put(payload, self.head)
        at = len(self.head)
        for tensor in self.tensors.values():
            payload[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            at += tensor.nbytes
        payload[at:].zero_()
        header = FrameHeader(kind, index, layer, self.length, digest(payload), stream)
        _put(out, header.pack())
        return header


def _put(out: torch.Tensor, data: bytes) -> None:
    out[: len(data)].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def read_payload(header: FrameHeader, payload: torch.Tensor) -> tuple["Fields", dict[str, torch.Tensor]]:
    """Check a payload and take it apart.

    Args:
        header: Its frame's.
        payload: uint8 `[header.padded]`, aligned.

    Returns:
        The metadata, and tensors by name: views of the payload, each with a storage of its own.

    Raises:
        WireError: damage, or what the layout forbids.
    """
    if len(payload) != header.padded:
        raise WireError(f"{len(payload)} bytes of payload where its header says {header.padded}")
    if digest(payload) != header.digest:
        raise WireError("damaged payload: its digest is wrong")
    if header.length < 8:
        raise WireError(f"a payload of {header.length} bytes has no safetensors header")
    size = int.from_bytes(host_bytes(payload[:8]), "little")
    if size > min(MAX_JSON, header.length - 8) or (8 + size) % ALIGNMENT:
        raise WireError(f"a safetensors header of {size} bytes in a payload of {header.length}")
    described = parse_json(host_bytes(payload[8 : 8 + size]))
    metadata = described.pop(_METADATA, None)
    if not isinstance(metadata, dict) or metadata.keys() != {_OURS} or not isinstance(metadata[_OURS], str):
        raise WireError(f"no {_METADATA!r} with {_OURS!r} in it")
    data = payload[8 + size : header.length]
    return Fields(parse_json(metadata[_OURS].encode())), _tensors(described, data)


def _tensors(described: dict[str, Any], data: torch.Tensor) -> dict[str, torch.Tensor]:
    spans: list[tuple[int, int, str, torch.dtype, list[int]]] = []
    for name, entry in described.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise WireError(f"tensor {name!r} is described by {entry!r}")
        shape, offsets, dtype = entry["shape"], entry["data_offsets"], DTYPES.get(str(entry["dtype"]))
        if dtype is None:
            raise WireError(f"tensor {name!r} has dtype {entry['dtype']!r}; known are {', '.join(DTYPES)}")
        if not _sizes(shape) or len(shape) > 8 or not _sizes(offsets) or len(offsets) != 2:
            raise WireError(f"tensor {name!r} has shape {shape!r} and offsets {offsets!r}")
        if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
            raise WireError(f"tensor {name!r}: {shape} of {entry['dtype']} does not fill bytes {offsets}")
        spans.append((*offsets, name, dtype, shape))
    end = 0
    for begin, stop, name, dtype, _ in sorted(spans, key=lambda span: span[:3]):
        if begin != end or begin % dtype.itemsize:
            raise WireError(f"tensor {name!r} begins at byte {begin}, not {end}: overlap, hole or misalignment")
        end = stop
    if end != len(data):
        raise WireError(f"tensors fill {end} of {len(data)} bytes")
    return {name: _view(data[begin:stop], dtype, shape) for begin, stop, name, dtype, shape in spans}


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < MAX_INTEGER for n in value)


def _view(data: torch.Tensor, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    if not len(data):
        return torch.empty(shape, dtype=dtype, device=data.device)
    # Through DLPack the view has a storage of just its bytes: it counts, copies and pickles as what it is.
    return torch.from_dlpack(data.view(dtype).view(shape))


def parse_json(text: bytes) -> dict[str, Any]:
    """A JSON object without duplicate keys, numbers out of range, or anything that is no JSON.

    Raises:
        WireError: it is none.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        if len(set(keys)) < len(keys):
            raise WireError(f"duplicate name in JSON: {max(keys, key=keys.count)!r}")
        return dict(items)

    def constant(name: str) -> NoReturn:
        raise WireError(f"{name} in JSON")

    def integer(digits: str) -> int:
        if len(digits) > 15 or abs(int(digits)) >= MAX_INTEGER:
            raise WireError(f"integer out of range in JSON: {digits[:20]}")
        return int(digits)

    def real(digits: str) -> float:
        if not math.isfinite(float(digits)):
            raise WireError(f"number out of range in JSON: {digits[:20]}")
        return float(digits)

    try:
        value = json.loads(
            text.decode(), object_pairs_hook=pairs, parse_constant=constant, parse_int=integer, parse_float=real
        )
    except WireError:
        raise
    except (ValueError, RecursionError) as error:
        raise WireError(f"no JSON: {str(error)[:80]}") from None
    if not isinstance(value, dict):
        raise WireError(f"a JSON object was expected, got {type(value).__name__}")
    return value


class Fields:
    """The metadata of a payload: each field is taken once and checked; `done` refuses what is left."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._left = dict(values)

    def take(self, name: str, *types: type) -> Any:
        """A field of one of `types`, exactly."""
        if name not in self._left:
            raise WireError(f"no field {name!r} in the metadata")
        value = self._left.pop(name)
        if type(value) not in types:
            raise WireError(f"field {name!r} is {_short(value)}, no {' or '.join(t.__name__ for t in types)}")
        return value

    def integer(self, name: str, low: int, high: int) -> int:
        """An integer from `low` to `high`."""
        value = self.take(name, int)
        if not low <= value <= high:
            raise WireError(f"field {name!r} is {value}, not from {low} to {high}")
        return value

    def equal(self, name: str, expected: Any) -> None:
        """A field with one possible value."""
        if (value := self.take(name, type(expected))) != expected:
            raise WireError(f"field {name!r} is {_short(value)}, expected {_short(expected)}")

    def done(self) -> None:
        """Refuse fields that nothing has asked for."""
        if self._left:
            raise WireError(f"unknown fields in the metadata: {_short(sorted(self._left))}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
