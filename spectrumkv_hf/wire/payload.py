"""Payloads: metadata and tensors in the safetensors layout, and what checks them. See docs/wire-format.md."""

import itertools
import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

from spectrumkv_hf.wire.frame import (
    ALIGNMENT,
    FrameHeader,
    Kind,
    WireError,
    as_tensor,
    digest,
    hashed,
    host_bytes,
    padded,
    put,
    shown,
    sums_of,
)
from spectrumkv_hf.wire.mac import FrameMacs
from spectrumkv_kernels import Codec, affine_flaws, write_sums
from spectrumkv_kernels.wire.affine import NEGATIVE, NOT_FINITE

MAX_JSON = 1 << 20
"""Bytes of JSON in a payload."""
BEGINNING = 4096
"""Bytes of a frame that are read from a device together, as they mostly hold all that the host has to know."""
MAX_LENGTH = 1 << 24
"""Tokens of a sequence."""
MAX_INTEGER = 1 << 48
EXPANSION = 256
"""Elements of keys and values that a layer may stand for, by byte of its tensors: the thriftiest policy keeps a token
in a hundred, of two bytes an element."""
SLACK = 4096
"""Bytes that every layer is credited with, for those of few tokens that are all dropped."""
FREE_LENGTH = 1 << 16
"""Tokens that any stream may announce; more of them no more than it has bytes."""
SCALES = 2.0**-96, 2.0**64
"""The least and the greatest scale of a frame. Keys and values that float16 holds give none beyond, and codes times one
of these are finite in float32."""

DTYPES = {
    "F64": torch.float64,
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

Parts = tuple[dict[str, Any], dict[str, torch.Tensor]]
"""Metadata and tensors by name."""


class Payload:
    """A payload to be written: metadata and tensors, laid out as safetensors asks.

    Tensors are ordered by the largest power of two that divides their bytes, so that each is aligned without holes.

    Args:
        metadata: What JSON can hold.
        tensors: By name, of any strides.

    Raises:
        WireError: a dtype, number or length that a reader would not take.
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
            if tensor.dtype not in _NAMES:
                raise WireError(f"tensor {name!r} has dtype {tensor.dtype}; those that can travel: {', '.join(DTYPES)}")
            described[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (padded(8 + len(text)) - 8 - len(text))
        if len(text) > MAX_JSON:
            raise WireError(f"{len(text)} bytes of metadata; at most {MAX_JSON} are allowed")
        self.head = struct.pack("<Q", len(text)) + text
        self.length = len(self.head) + end

    @property
    def frame_bytes(self) -> int:
        """Bytes of the frame: header, payload, padding. With a key its MAC comes behind them."""
        return FrameHeader.SIZE + padded(self.length)

    def frame(
        self,
        kind: Kind,
        index: int = 0,
        layer: int = -1,
        stream: int = 0,
        macs: FrameMacs | None = None,
        device: torch.device | None = None,
    ) -> tuple[FrameHeader, torch.Tensor]:
        """The frame and its header.

        Args:
            kind, index, layer, stream: As in `FrameHeader`.
            macs: Of its stream, for the MAC; None: it has none.
            device: Of the frame; None: that of the tensors, or the CPU where there are none.

        Returns:
            The header, and the frame with it, uint8 `[bytes]`.
        """
        device = device or next((t.device for t in self.tensors.values()), torch.device("cpu"))
        size = self.frame_bytes + (macs.size if macs else 0)
        out = torch.empty(size, dtype=torch.uint8, device=device)
        return self.write(out, kind, index, layer, stream, macs), out

    def write(
        self,
        out: torch.Tensor,
        kind: Kind,
        index: int,
        layer: int = -1,
        stream: int = 0,
        macs: FrameMacs | None = None,
    ) -> FrameHeader:
        """Write the frame into `out`, uint8 `[frame_bytes]`, or `macs.size` more, on the tensors' device."""
        macs = macs or FrameMacs()
        check = hashed(write_payloads([self], out))[0]
        header = FrameHeader(kind, index, layer, self.length, check, stream, macs.key_id)
        put(out, macs.pieces(header, out[FrameHeader.SIZE : self.frame_bytes]))
        return header

    def _ends(self) -> list[tuple[int, bytes]]:
        """The JSON, and zeros for the padding, which the tensors follow, with their places in the frame."""
        ends = [(FrameHeader.SIZE, self.head)]
        if self.length % ALIGNMENT:
            ends.append((self.frame_bytes - ALIGNMENT, bytes(ALIGNMENT)))
        return ends

    def _write_tensors(self, payload: torch.Tensor) -> torch.Tensor:
        """Write the tensors into a payload of which the rest is there. Returns its sums."""
        if not self.tensors:
            return sums_of(as_tensor(self.head))  # on the host, where it is known
        return write_sums(payload, list(self.tensors.values()), len(self.head))


def write_payloads(payloads: Sequence[Payload], out: torch.Tensor, apart: int = 0) -> list[torch.Tensor]:
    """Write frames but for their headers into `out`, uint8, one `apart` bytes behind the other.

    Returns:
        What each frame's digest is the hash of, to be asked of the device at once.
    """
    starts = list(itertools.accumulate((p.frame_bytes + apart for p in payloads), initial=0))
    put(out, [(start + at, data) for start, p in zip(starts, payloads, strict=False) for at, data in p._ends()])
    return [
        p._write_tensors(out[start + FrameHeader.SIZE : start + p.frame_bytes])
        for start, p in zip(starts, payloads, strict=False)
    ]


def _dump(value: Any) -> str:
    try:
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise WireError(f"{shown(value)} can't be written: {error}") from None
    parse_json(text)  # a reader would refuse the same numbers
    return text


def check_expansion(rows: int, tokens: int, channels: int, nbytes: int) -> None:
    """Refuse a layer that would take memory out of proportion to its bytes as soon as it is used.

    Args:
        rows: Batch times KV heads; where one of them is 0 it counts as 1.
        tokens: That the layer stands for, dropped ones included, those that have left its window not.
        channels: Of a key and a value together.
        nbytes: Of the layer's tensors.

    Raises:
        WireError: it stands for too much.
    """
    most = EXPANSION * (nbytes + SLACK)
    if (elements := rows * max(tokens * channels, 1)) > most:
        raise WireError(
            f"{nbytes} bytes that stand for {elements} elements, {tokens} tokens of {rows} heads and {channels} "
            f"channels, almost all of them dropped; they may stand for {most}"
        )


def check_length(length: int, nbytes: int) -> None:
    """Refuse a stream of `nbytes` bytes that announces more tokens than it can account for, as a `WireError`.

    Layers of a window and of recurrent states hold no more for a longer sequence, but masks and positions do.
    """
    if length > FREE_LENGTH + nbytes:
        raise WireError(f"{length} tokens in a stream of {nbytes} bytes; it can have {FREE_LENGTH + nbytes}")


@dataclass
class Later:
    """What of several frames is asked of the device at once, after all of them have been read."""

    checks: "Checks" = field(default_factory=lambda: Checks())
    sums: list[torch.Tensor] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)

    def settle(self) -> None:
        """Raise a `WireError` if anything is wrong with any of the frames."""
        if hashed(self.sums) != self.digests:
            raise WireError(_DAMAGED)
        self.checks.settle()


_DAMAGED = "damaged payload: its digest is wrong"


def read_payload(
    header: FrameHeader, payload: torch.Tensor, begin: bytes = b"", later: Later | None = None
) -> tuple["Fields", dict[str, torch.Tensor]]:
    """Check a payload and take it apart.

    Args:
        header: Its frame's.
        payload: uint8 `[header.padded]`, aligned.
        begin: Some of its first bytes, where they are known on the host.
        later: Takes the check of the digest; None: it is done first of all.

    Returns:
        The metadata, and tensors by name: views of the payload, each with a storage of its own.

    Raises:
        WireError: damage, or what the layout forbids.
    """
    if len(payload) != header.padded:
        raise WireError(f"{len(payload)} bytes of payload where its header says {header.padded}")
    if later is not None:
        later.sums.append(sums_of(payload))
        later.digests.append(header.digest)
    elif digest(payload) != header.digest:
        raise WireError(_DAMAGED)
    if header.length < 8:
        raise WireError(f"a payload of {header.length} bytes has no safetensors header")
    begin = begin or host_bytes(payload[:BEGINNING])
    size = int.from_bytes(begin[:8], "little")
    if size > min(MAX_JSON, header.length - 8) or (8 + size) % ALIGNMENT:
        raise WireError(f"a safetensors header of {size} bytes in a payload of {header.length}")
    text = begin[8 : 8 + size] if 8 + size <= len(begin) else host_bytes(payload[8 : 8 + size])
    described = parse_json(text)
    metadata = described.pop(_METADATA, None)
    if not isinstance(metadata, dict) or metadata.keys() != {_OURS} or not isinstance(metadata[_OURS], str):
        raise WireError(f"no {_METADATA!r} with {_OURS!r} in it")
    data = payload[8 + size : header.length]
    return Fields(parse_json(metadata[_OURS])), _tensors(described, data)


def _tensors(described: dict[str, Any], data: torch.Tensor) -> dict[str, torch.Tensor]:
    spans: list[tuple[int, int, str, torch.dtype, list[int]]] = []
    for name, entry in described.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise WireError(f"tensor {shown(name)} is described by {shown(entry)}")
        shape, offsets, kind = entry["shape"], entry["data_offsets"], entry["dtype"]
        dtype = DTYPES.get(kind) if isinstance(kind, str) else None
        if dtype is None:
            raise WireError(f"tensor {shown(name)} has dtype {shown(kind)}; known are {', '.join(DTYPES)}")
        if not _sizes(shape, 8) or not _sizes(offsets, 2) or len(offsets) != 2:
            raise WireError(f"tensor {shown(name)} has shape {shown(shape)} and offsets {shown(offsets)}")
        if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
            raise WireError(f"tensor {shown(name)}: {shape} of {kind} does not fill bytes {offsets}")
        if math.prod(filter(None, shape)) >= MAX_INTEGER:  # without an element, but with strides beyond 64 bits
            raise WireError(f"tensor {shown(name)} has shape {shape}: its sizes but for 0 multiply to 2^48 or more")
        spans.append((*offsets, name, dtype, shape))
    end = 0
    for begin, stop, name, dtype, _ in sorted(spans, key=lambda span: span[:3]):
        if begin != end or begin % dtype.itemsize:
            raise WireError(f"tensor {shown(name)} begins at byte {begin}, not {end}: overlap, hole or misalignment")
        end = stop
    if end != len(data):
        raise WireError(f"tensors fill {end} of {len(data)} bytes")
    memory = data.numpy().data if data.is_cpu else None
    return {name: _view(data, memory, begin, stop, dtype, shape) for begin, stop, name, dtype, shape in spans}


def _sizes(value: Any, most: int) -> bool:
    """Whether it is a list of at most so many sizes."""
    return (
        isinstance(value, list)
        and len(value) <= most
        and not [n for n in value if type(n) is not int or not 0 <= n < MAX_INTEGER]
    )


def _view(
    data: torch.Tensor, memory: memoryview | None, begin: int, end: int, dtype: torch.dtype, shape: list[int]
) -> torch.Tensor:
    """A tensor of some bytes of `data`, whose `memory` is given on the CPU.

    It has a storage of just its bytes: it counts, copies and pickles as what it is. Kernels read pairs of scale and
    zero, and neighbouring codes, as one word, so that a tensor lies at a multiple of the largest power of two that
    divides its bytes, up to 64, as our writer lays them; one that another writer has put elsewhere is copied.
    """
    size = end - begin
    if not size:
        return torch.empty(shape, dtype=dtype, device=data.device)
    if memory is not None:
        count = size // dtype.itemsize
        view = torch.frombuffer(memory, dtype=dtype, count=count, offset=begin).view(shape)
    else:
        view = from_dlpack(to_dlpack(data[begin:end].view(dtype).view(shape)))
    return view.clone() if view.data_ptr() % min(size & -size, ALIGNMENT) else view


def parse_json(text: bytes | str) -> dict[str, Any]:
    """A JSON object without duplicate keys, numbers out of range, or anything that is no JSON.

    Strings in it may still be anything, lone surrogates included: show them by `shown`.

    Raises:
        WireError: it is none.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            ((key, _),) = Counter(key for key, _ in items).most_common(1)
            raise WireError(f"duplicate name in JSON: {shown(key)}")
        return found

    def constant(name: str) -> NoReturn:
        raise WireError(f"{name} in JSON")

    def integer(digits: str) -> int:
        if len(digits) < 15:  # surely in range
            return int(digits)
        if len(digits) > 15 or abs(int(digits)) >= MAX_INTEGER:
            raise WireError(f"integer out of range in JSON: {digits[:20]}")
        return int(digits)

    def real(digits: str) -> float:
        if len(digits) > 40 or not math.isfinite(float(digits)):
            raise WireError(f"number out of range in JSON: {digits[:20]}")
        return float(digits)

    try:
        value = json.loads(
            text.decode() if isinstance(text, bytes) else text,
            object_pairs_hook=pairs,
            parse_constant=constant,
            parse_int=integer,
            parse_float=real,
        )
    except WireError:
        raise
    except (ValueError, RecursionError) as error:
        raise WireError(f"no JSON: {shown(str(error))}") from None
    if not isinstance(value, dict):
        raise WireError(f"a JSON object was expected, got {type(value).__name__}")
    return value


class Fields:
    """The metadata of a payload: each field is taken once and checked; `done` refuses what is left."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._left = dict(values)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, *types: type) -> Any:
        """A field of one of `types`, exactly."""
        if name not in self._left:
            raise WireError(f"no field {name!r} in the metadata")
        value = self._left.pop(name)
        if type(value) not in types:
            raise WireError(f"field {name!r} is {shown(value)}, no {' or '.join(t.__name__ for t in types)}")
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
            raise WireError(f"field {name!r} is {shown(value)}, expected {shown(expected)}")

    def done(self) -> None:
        """Refuse fields that nothing has asked for."""
        if self._left:
            raise WireError(f"unknown fields in the metadata: {shown(sorted(self._left))}")


_FLAWS = {NOT_FINITE: "NaN or infinity", NEGATIVE: "scales below 0"}


class Checks:
    """Conditions on tensors, asked of the device all at once."""

    def __init__(self) -> None:
        self._asked: list[tuple[torch.Tensor, Callable[[Any], None]]] = []
        self._affines: list[tuple[str, torch.Tensor]] = []

    def ask(self, value: torch.Tensor, then: Callable[[Any], None]) -> None:
        """Have `then` called with the number in `value`, or with a list of those in one of one dimension."""
        self._asked.append((value, then))

    def expect(self, value: torch.Tensor, sound: Callable[[Any], bool], message: str) -> None:
        """`message`, unless what is in `value` is `sound`."""

        def check(number: Any) -> None:
            if not sound(number):
                raise WireError(message)

        self.ask(value, check)

    def refuse(self, failed: torch.Tensor, message: str) -> None:
        """`message`, where any of `failed`, bool, is True."""
        self.expect(failed.any(), lambda any_failed: not any_failed, message)

    def affine(self, name: str, affine: torch.Tensor) -> None:
        """Refuse numbers that are not finite, and scales below 0."""
        self._affines.append((name, affine))

    def settle(self) -> None:
        """Raise the first message that applies, as a `WireError`."""
        affines, self._affines = self._affines, []
        if affines:
            flaws = affine_flaws([affine for _, affine in affines])
            for (name, _), flaw in zip(affines, flaws, strict=True):
                if flaw:
                    raise WireError(f"tensor {name!r} has {_FLAWS[flaw]}")
        asked, self._asked = self._asked, []
        alike: dict[Any, list[torch.Tensor]] = {}
        for value, _ in asked:
            if not value.is_cpu:
                alike.setdefault((value.dtype, value.shape), []).append(value)
        numbers = {kind: iter(torch.stack(values).tolist()) for kind, values in alike.items()}
        for value, then in asked:
            then(value.tolist() if value.is_cpu else next(numbers[value.dtype, value.shape]))


def _fits(sizes: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    return len(sizes) == len(shape) and all(n in (None, size) for n, size in zip(shape, sizes, strict=True))


class Tensors:
    """The tensors of a payload: each is taken once and checked; `done` refuses what is left.

    Attributes:
        nbytes: Of all of them.
        checks: Of what they hold.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], checks: Checks | None = None) -> None:
        self._left = dict(tensors)
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        self.checks = Checks() if checks is None else checks

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def rank(self, name: str) -> int:
        """How many dimensions a tensor has."""
        return self._left[name].dim()

    def take(self, name: str, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> torch.Tensor:
        """A tensor of one of `dtypes` and of `shape`, where None stands for any size."""
        if name not in self._left:
            raise WireError(f"no tensor {name!r}")
        tensor = self._left.pop(name)
        if tensor.dtype not in dtypes:
            raise WireError(f"tensor {name!r} has dtype {tensor.dtype}, not {' or '.join(str(t) for t in dtypes)}")
        sizes = tuple(tensor.shape)
        if sizes != shape and not _fits(sizes, shape):
            expected = ", ".join("any" if n is None else str(n) for n in shape)
            raise WireError(f"tensor {name!r} has shape {sizes}, not ({expected})")
        return tensor

    def floats(self, name: str, shape: tuple[int | None, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of finite numbers."""
        tensor = self.take(name, shape, dtype)
        if tensor.numel():
            least, most = tensor.aminmax()  # NaN where there is one
            message = f"tensor {name!r} has {_FLAWS[NOT_FINITE]}"
            self.checks.expect(least, lambda number: number > -math.inf, message)
            self.checks.expect(most, lambda number: number < math.inf, message)
        return tensor

    def frame(self, name: str, rows: tuple[int, int], codec: Codec, key_dim: int, value_dim: int) -> torch.Tensor:
        """The frame of a layer, float32 `[*rows, codec.frame_size]`: finite, its scales in the range of `SCALES`."""
        frame = self.floats(name, (*rows, codec.frame_size(key_dim, value_dim)), torch.float32)
        _, parts = codec.parts(frame, key_dim)
        for scale in (parts.key_scale, parts.value_scale) if parts is not None else ():
            if scale.numel():
                least, most = scale.aminmax()
                message = f"tensor {name!r} has scales that are not from {SCALES[0]:.0e} to {SCALES[1]:.0e}"
                self.checks.expect(least, lambda number: number >= SCALES[0], message)
                self.checks.expect(most, lambda number: number <= SCALES[1], message)
        return frame

    def affine(self, name: str, shape: tuple[int, ...], codec: Codec) -> torch.Tensor:
        """Scales, or scales and zeros, as in `Quantized`; every byte is a sound scale."""
        count, dtype = codec.affine
        tensor = self.take(name, (*shape, count), dtype)
        if dtype != torch.uint8:
            self.checks.affine(name, tensor)
        return tensor

    def done(self) -> None:
        if self._left:
            raise WireError(f"unknown tensors: {shown(sorted(self._left))}")
