"""Frames: a fixed header with checksums, then a payload. See docs/wire-format.md."""

import hashlib
import mmap
import reprlib
import struct
import warnings
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import torch

from spectrumkv_kernels import digest_sums

Buffer = bytes | bytearray | memoryview | mmap.mmap | torch.Tensor
"""What can be read: anything with the buffer protocol, or a uint8 tensor `[bytes]` on any device."""

MAGIC = b"SPECTRKV"
VERSION = 1
ALIGNMENT = 64
"""Frames, and the tensors' part of a payload, begin at multiples of this many bytes."""
MAC_BYTES = 64
"""Of the MAC behind the payload of a frame that has one."""
NO_KEY = bytes(8)
"""Which key has made the MAC of a frame without one."""


class WireError(ValueError):
    """Bytes that are no sound cache, or not this model's; the message says what is wrong, and where.

    Attributes:
        located: Whether the message names the frame.
    """

    def __init__(self, message: str, located: bool = False) -> None:
        super().__init__(message)
        self.located = located


_brief = reprlib.Repr()
_brief.maxlevel, _brief.maxstring, _brief.maxlist, _brief.maxdict = 3, 60, 10, 6


def shown(value: Any) -> str:
    """A value of a peer's JSON for an error message: printable, at most 120 characters, at a cost that is bounded.

    `repr` would write out a megabyte, and fail where lists are nested deeply.
    """
    text = _brief.repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


class Kind(IntEnum):
    """What a frame carries."""

    HEADER = 1
    LAYER = 2
    END = 3
    REQUEST = 4
    PATCH = 5
    BLOCKS = 6
    GREETING = 7


class Place(NamedTuple):
    """A frame's place in a stream, -1 for the layer of frames that belong to none."""

    kind: Kind
    layer: int = -1

    def __str__(self) -> str:
        return f"layer {self.layer}" if self.kind == Kind.LAYER else f"the {self.kind.name.lower()} frame"

    @classmethod
    def of(cls, index: int, layers: int) -> "Place":
        """That of frame `index` in the stream of a cache of `layers` layers."""
        if not index:
            return cls(Kind.HEADER)
        return cls(Kind.LAYER, index - 1) if index <= layers else cls(Kind.END)


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
        key_id: Tells which key has made the MAC behind the payload, 8 bytes; zeros: there is none.
    """

    SIZE = 64
    _LAYOUT = struct.Struct("<8sHHIiIQQQ8s4s")  # and the CRC-32 of these 60 bytes

    kind: Kind
    index: int
    layer: int
    length: int
    digest: int
    stream: int = 0
    key_id: bytes = NO_KEY

    @property
    def place(self) -> Place:
        """What it belongs to."""
        return Place(self.kind, self.layer)

    @property
    def padded(self) -> int:
        """Bytes of the payload with the zeros that pad it."""
        return padded(self.length)

    @property
    def has_mac(self) -> bool:
        """Whether there is a MAC behind the payload."""
        return self.key_id != NO_KEY

    @property
    def rest(self) -> int:
        """Bytes that follow the header."""
        return self.padded + (MAC_BYTES if self.has_mac else 0)

    def pack(self) -> bytes:
        """The 64 bytes."""
        fields = (self.kind, self.index, self.layer, self.has_mac, self.length, self.digest, self.stream)
        head = self._LAYOUT.pack(MAGIC, VERSION, *fields, self.key_id, bytes(4))
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
        raw = data[: cls.SIZE] if isinstance(data, bytes) else host_bytes(as_tensor(data)[: cls.SIZE])
        if len(raw) < cls.SIZE:
            raise WireError(f"a frame header has {cls.SIZE} bytes, got {len(raw)}")
        magic, version, kind, index, layer, flags, length, check, stream, key_id, reserved = cls._LAYOUT.unpack(
            raw[:-4]
        )
        if magic != MAGIC:
            raise WireError(f"no frame: begins with {magic!r}, not {MAGIC!r}")
        if version != VERSION:
            raise WireError(f"format version {version}; this release reads version {VERSION}")
        if zlib.crc32(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
            raise WireError("damaged frame header: its CRC-32 is wrong")
        if kind not in Kind.__members__.values():
            raise WireError(f"unknown kind of frame: {kind}")
        if flags != any(key_id) or any(reserved):
            raise WireError("reserved fields of the frame header are not 0")
        if limit is not None and padded(length) > limit:
            raise WireError(f"a payload of {length} bytes, more than the limit of {limit}")
        return cls(Kind(kind), index, layer, length, check, stream, key_id)


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


def put(out: torch.Tensor, pieces: list[tuple[int, bytes]]) -> None:
    """Write pieces of `ALIGNMENT` bytes or a multiple at such places of `out`, uint8 `[bytes]`; on a device at once."""
    if out.is_cpu:
        memory = out.numpy().data
        for at, data in pieces:
            memory[at : at + len(data)] = data
    else:
        _send(out, pieces)


def _send(out: torch.Tensor, pieces: list[tuple[int, bytes]]) -> None:
    """`put` by one transfer, in which the places go ahead, and one operation."""
    rows = [at // ALIGNMENT + i for at, data in pieces for i in range(len(data) // ALIGNMENT)]
    sent = as_tensor(bytearray(struct.pack(f"<{len(rows)}q", *rows) + b"".join(data for _, data in pieces)))
    if out.is_cuda:
        sent = sent.pin_memory()  # then nothing waits for it
    sent = sent.to(out.device, non_blocking=True)
    where, what = sent[: 8 * len(rows)].view(torch.int64), sent[8 * len(rows) :].view(-1, ALIGNMENT)
    out.view(-1, ALIGNMENT).index_copy_(0, where, what)


# -- checksum ---------------------------------------------------------------------------------------------------------


def digest(payload: torch.Tensor) -> int:
    """Checksum of a padded payload, 64 bits: a vectorised one, so that it costs little on CPUs and GPUs.

    It is the BLAKE2b of `spectrumkv_kernels`' `digest_sums`. It detects damage, not forgery.

    Args:
        payload: uint8 `[bytes]`, a multiple of 8 of them.
    """
    return hashed([sums_of(payload)])[0]


def sums_of(payload: torch.Tensor) -> torch.Tensor:
    """What the digest of a padded payload is the hash of, int64 on its device."""
    return digest_sums(payload.view(torch.int64))


def hashed(sums: list[torch.Tensor]) -> list[int]:
    """The digests of payloads by their sums, for all of which a device is asked once."""
    far = [t for t in sums if not t.is_cpu]
    read = iter(torch.cat(far).cpu().split([len(t) for t in far]) if far else ())
    return [_hash((t if t.is_cpu else next(read)).numpy().data) for t in sums]


def _hash(data: bytes | memoryview) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def digest_of_digests(digests: list[int]) -> int:
    """What the end frame says of the digests of all frames before it."""
    return _hash(b"".join(n.to_bytes(8, "little") for n in digests))
