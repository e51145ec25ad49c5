"""Entries of a `PrefixStore`: names, which are hashes of tokens, and bytes, which are checked or authenticated.

An entry is a head of 128 bytes, its tokens' ids, zeros up to a multiple of 64 bytes, and a stream as in
docs/wire-format.md. All of it is little-endian.

| offset | type | field |
|---|---|---|
| 0 | 8 bytes | `SPKVPRFX` |
| 8 | u16, u16 | version, 1; 0 |
| 12 | u32 | tokens |
| 16 | u64 | bytes of the stream |
| 24 | 8 bytes | which key has made the MAC; 0: none has |
| 32 | 16 bytes | what the chain of hashes starts from |
| 48 | 16 bytes | 0 |
| 64 | 64 bytes | BLAKE2b of the entry's name, the first 64 bytes, and all that follows the head; with a key its MAC |
| 128 | u32 each | ids of the tokens |
"""

import hashlib
import re
import struct
from typing import NamedTuple, Self

import torch

from spectrumkv_hf.wire.frame import WireError, padded
from spectrumkv_hf.wire.mac import check_key_id, is_same, key_id, mac

BLOCK = 64
"""Tokens of a block, the unit in which prefixes are known."""
HEAD = 128
LINK = 16
"""Bytes of a hash in a chain."""
MAGIC = b"SPKVPRFX"
VERSION = 1
_FIELDS = struct.Struct("<8sHHIQ8s16s16s")
_NAME = re.compile(r"([0-9a-f]{32})\.([1-9][0-9]{0,7})\.(0|[1-9][0-9]{0,7})")


class EntryName(NamedTuple):
    """What an entry is called.

    Attributes:
        digest: Of its tokens, and of what their chain starts from, 32 hex digits.
        tokens: How many it holds.
        least: The fewest tokens to which it can be cropped.
    """

    digest: str
    tokens: int
    least: int

    def __str__(self) -> str:
        return ".".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The name that is spelt so, or None."""
        found = _NAME.fullmatch(text)
        return found and cls(found[1], int(found[2]), int(found[3]))


class Chain:
    """Hashes of the whole blocks of some tokens, each of which depends on all tokens before it.

    Attributes:
        ids: int32 `[tokens]`.
        links: Of the blocks, 32 hex digits each.
    """

    def __init__(self, start: bytes, ids: torch.Tensor) -> None:
        self.ids, self._start = ids, start
        raw, link = ids.numpy().tobytes(), start
        self.links: list[str] = []
        for block in range(len(ids) // BLOCK):
            link = _hash(link + raw[4 * BLOCK * block :][: 4 * BLOCK], b"block")
            self.links.append(link.hex())

    def digest(self, tokens: int) -> str:
        """Of the first `tokens` ids, the last block of which need not be whole."""
        whole = tokens // BLOCK
        link = bytes.fromhex(self.links[whole - 1]) if whole else self._start
        return _hash(link + self.ids[whole * BLOCK : tokens].numpy().tobytes(), b"end").hex()


def _hash(data: bytes, person: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=LINK, person=person).digest()


def pack(name: EntryName, start: bytes, ids: torch.Tensor, stream: memoryview, key: bytes | None) -> bytes:
    """What stands before the stream of an entry.

    Args:
        name: Of the entry.
        start: What its chain starts from, `LINK` bytes.
        ids: int32 `[tokens]`.
        stream: The cache's bytes.
        key: Of the MAC; None: a checksum takes its place.
    """
    raw = ids.numpy().tobytes()
    raw = raw.ljust(padded(len(raw)), b"\0")
    fields = _FIELDS.pack(MAGIC, VERSION, 0, len(ids), len(stream), key_id(key), start, bytes(16))
    return fields + _check(name, [fields, raw, stream], key) + raw


def size_of(head: bytes) -> int:
    """Bytes of the entry that begins so.

    Raises:
        WireError: it is none, or of another version.
    """
    if len(head) < HEAD:
        raise WireError(f"an entry's head has {HEAD} bytes, got {len(head)}")
    magic, version, _, tokens, stream, *_ = _FIELDS.unpack(head[: _FIELDS.size])
    if magic != MAGIC or version != VERSION:
        raise WireError(f"begins with {magic!r} and version {version}, not with {MAGIC!r} and {VERSION}")
    return HEAD + padded(4 * tokens) + stream


def unpack(name: EntryName, data: torch.Tensor, key: bytes | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, int32 `[tokens]`, and stream, uint8 `[bytes]`, of an entry, once its check is right.

    Args:
        name: Under which it was found.
        data: The entry, uint8 `[bytes]` on the CPU.
        key: As in `pack`.

    Raises:
        KeyRefused: it has no MAC of this key; or this is None, and it has one.
        WireError: it is damaged, or another entry's.
    """
    memory = data.numpy().data
    head = bytes(memory[:HEAD])
    if (size := size_of(head)) != len(data):
        raise WireError(f"{len(data)} bytes or more, expected {size}")
    _, _, _, tokens, _, made_by, *_ = _FIELDS.unpack(head[: _FIELDS.size])
    check_key_id(made_by, key, "the store")
    check = _check(name, [head[: _FIELDS.size], memory[HEAD:]], key)
    if not is_same(check, head[_FIELDS.size :]):
        raise WireError(f"damaged, or another entry's: its {'MAC' if key else 'checksum'} is wrong")
    if tokens != name.tokens:
        raise WireError(f"{tokens} tokens, its name says {name.tokens}")
    begin = HEAD + padded(4 * tokens)
    return data[HEAD : HEAD + 4 * tokens].view(torch.int32), data[begin:]


def links_of(data: torch.Tensor) -> list[str]:
    """Links of the blocks of an entry, by its first bytes up to the end of its ids, which need not be sound."""
    head = bytes(data[:HEAD].numpy().data)
    ids = data[HEAD:][: len(data[HEAD:]) // 4 * 4].view(torch.int32)
    return Chain(_FIELDS.unpack(head[: _FIELDS.size])[6], ids).links if len(head) == HEAD else []


def _check(name: EntryName, parts: list[bytes | memoryview], key: bytes | None) -> bytes:
    return mac(key, b"prefix entry", f"{name}\n".encode(), *parts)
