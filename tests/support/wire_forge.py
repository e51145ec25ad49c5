"""A tiny cache with fixed contents, and tools to take frames apart and to forge others with right checksums."""

import hashlib
import json
import re
import struct
import zlib

import torch
from families import config

from spectrumkv_hf import SpectrumCache
from spectrumkv_hf.policy import TIERS
from spectrumkv_hf.tiered.store import Arena, TieredStore
from spectrumkv_hf.wire.frame import ALIGNMENT, FrameHeader, digest, padded
from spectrumkv_kernels import Quantized

CONFIG = config("llama", head_dim=8, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)


def _counting(shape, dtype, start=0):
    """Numbers that all dtypes hold exactly, a different one at every place of the first 250."""
    size = torch.Size(shape).numel()
    return ((torch.arange(size) + start) % 251).to(dtype).view(shape)


ROWS = {
    "spectrum": ([[0, 1, 2], [3, 4, 5, 11, 12], [6, 7, 8, 9, 10]], [[0, 1, 7], [2, 9, 10, 11], [3, 4, 5, 6, 8, 12]]),
    "spectrum2": (
        [[0, 1, 2], [3, 11, 12], [4, 5], [6, 7], [8, 9, 10]],
        [[0, 1], [2, 10], [9, 11], [3, 4, 5], [6, 7, 8, 12]],
    ),
}
"""Positions by tier of two rows, in as many of the most precise tiers as there are lists."""


def golden_cache(codec="spectrum"):
    """A batch of 2 with a padded row: 13 tokens in tiers as `ROWS` says (places of some are empty), 2 in the tail.

    With `spectrum` there are 3 places in FP16, 5 in INT8 and 6 in INT4; `spectrum2` has all tiers. No number in it
    comes from floating-point arithmetic, so that its bytes are the same everywhere.
    """
    cache = SpectrumCache(CONFIG, policy="sink_protect", budget=0.3, recent_window=2, codec=codec)
    layer = cache.layers[0]
    keys, values = (_counting((2, 2, 2, 8), torch.float16, start) for start in (7, 90))
    arenas = []
    row, other = ROWS[codec]
    for code, tier in enumerate(TIERS[: len(row)]):
        n = max(len(row[code]), len(other[code]))
        chosen = [[-1] * (n - len(held[code])) + held[code] for held in (row, other, other, row)]
        positions = torch.tensor(chosen, dtype=torch.int32).view(2, 2, n)
        sides = []
        for start in (10 * code, 100 + 10 * code):
            if tier.bits == 16:
                sides.append(_counting((2, 2, n, 8), torch.float16, start))
                continue
            codes = _counting((2, 2, n, tier.bits), torch.uint8, start)
            if layer.codec.balanced:
                sides.append(Quantized(codes, _counting((2, 2, n, 1), torch.uint8, start + 100)))
                continue
            scale, zero = _counting((2, 2, n), torch.float16, start), -_counting((2, 2, n), torch.float16, start + 3)
            sides.append(Quantized(codes, torch.stack((scale, zero), dim=-1)))
        arenas.append(Arena(tier, *sides, positions))
    first = int(layer.codec.balanced)  # scales are above 0
    frame = _counting((2, 2, layer.codec.frame_size(8, 8)), torch.float32, first)
    store = TieredStore.assemble(
        keys,
        values,
        layer.codec,
        layer.rotary,
        length=15,
        tail_start=13,
        arenas=arenas,
        frame=frame,
        pads=torch.tensor([0, 4]),
        ragged=True,
    )
    layer.adopt(store)
    return cache


def split(data):
    """The frames of serialised bytes."""
    frames, at = [], 0
    while at < len(data):
        header = FrameHeader.parse(data[at:])
        end = at + FrameHeader.SIZE + header.rest
        frames.append(data[at:end])
        at = end
    return frames


def opened(frame):
    """Header, JSON of the payload, our metadata, and the tensors' bytes of a frame."""
    header = FrameHeader.parse(frame)
    payload = frame[FrameHeader.SIZE : FrameHeader.SIZE + header.length]
    size = struct.unpack("<Q", payload[:8])[0]
    described = json.loads(payload[8 : 8 + size])
    return header, described, json.loads(described["__metadata__"]["spectrumkv"]), payload[8 + size :]


def sealed(header, payload):
    """A frame of any payload, with right checksums."""
    padding = bytes(padded(len(payload)) - len(payload))
    check = digest(
        torch.frombuffer(bytearray(payload + padding) or bytearray(64), dtype=torch.uint8)[
            : len(payload) + len(padding)
        ]
    )
    fields = {**vars(header), "length": len(payload), "digest": check}
    return FrameHeader(**fields).pack() + payload + padding


def payload_of(text, data):
    """Payload of a JSON text and the tensors' bytes."""
    text += b" " * (padded(8 + len(text)) - 8 - len(text))
    assert (8 + len(text)) % ALIGNMENT == 0
    return struct.pack("<Q", len(text)) + text + data


def forged(frame, edit=None, describe=None, data=None, text=None):
    """A frame with its metadata changed by `edit`, its tensor descriptions by `describe`, its tensors by `data`, or its
    whole JSON text by `text`, under right checksums."""
    header, described, metadata, raw = opened(frame)
    if edit is not None:
        edit(metadata)
    described["__metadata__"]["spectrumkv"] = json.dumps(metadata, separators=(",", ":"))
    if describe is not None:
        describe(described)
    if data is not None:
        raw = data(described, bytearray(raw))
    encoded = json.dumps(described, separators=(",", ":")).encode()
    return sealed(header, payload_of(text(encoded) if text else encoded, bytes(raw)))


def resealed(data: bytes) -> bytes:
    """The stream with the checksums of its frames put right, as far as it has frames."""
    out, digests, at = bytearray(data), [], 0
    while at + FrameHeader.SIZE <= len(out):
        (length,) = struct.unpack("<Q", out[at + 24 : at + 32])
        start, end = at + FrameHeader.SIZE, at + FrameHeader.SIZE + padded(length)
        if end > len(out):
            break
        if out[at + 10] == 3:  # the end frame has the digest of digests
            total = digest_of(digests)
            text = re.sub(rb'digest\\":\\"[0-9a-f]{16}', b'digest\\":\\"' + total, bytes(out[start:end]))
            out[start:end] = text[: end - start]
        out[start + length : end] = bytes(end - start - length)
        payload = torch.frombuffer(out[start:end] or bytearray(64), dtype=torch.uint8)[: end - start]
        out[at + 32 : at + 40] = struct.pack("<Q", digest(payload))
        digests.append(bytes(out[at + 32 : at + 40]))
        out[at + 60 : at + 64] = struct.pack("<I", zlib.crc32(out[at : at + 60]))
        at = end
    return bytes(out)


def digest_of(digests: list[bytes]) -> bytes:
    value = hashlib.blake2b(b"".join(digests), digest_size=8).digest()
    return f"{int.from_bytes(value, 'little'):016x}".encode()
