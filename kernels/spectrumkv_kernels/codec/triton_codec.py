"""Triton twins of `codec.reference`: what reads codes."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..backend.launch_triton import Launcher, cdiv, next_power_of_2, on_device, shared
from ..rotation.rotary import Rotary
from ..rotation.triton_hadamard import hadamard, join_quarters
from ..rotation.triton_rotary import rotated_mean, turns
from ..segment import Segment, contiguous_rows
from . import reference as twin
from .quantize import WIDTHS, Quantized, divisor
from .reference import Codec
from .triton_quantize import load_affine, load_codes

ELEMENTS = 4096
"""Of a block of tokens and channels, for 4 warps."""
SEGMENTS = 4
"""Most segments that one launch reads."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def load_scale(scale, channels, DIM: tl.constexpr, EACH: tl.constexpr):
    """Of the frame, for these channels: `[1, channels]`, or where they share one its number."""
    if EACH:
        return tl.load(scale + channels, mask=channels < DIM, other=1.0)[None, :]
    else:
        return tl.load(scale)


@triton.jit
def _decode_tokens(
    x, stride, scales, zeros, positions, mean, spread, table, out, row, block, n, start, size,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, HADAMARD: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, EACH: tl.constexpr, SCATTER: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Write `TOKENS` keys or values of one row and segment to where they belong."""
    token = block * TOKENS + tl.arange(0, TOKENS)
    inside = token < n
    at = tl.load(positions + token, mask=inside, other=-1)
    channels = tl.arange(0, WIDTH)
    real = (channels < DIM)[None, :]
    if BITS == 16:
        place = x + token.to(tl.int64)[:, None] * stride + channels[None, :]
        y = tl.load(place, mask=inside[:, None] & real, other=0.0)
    else:
        stored = row * n + token
        scale, zero = load_affine(scales, zeros, stored, inside, BITS)
        if WIDTH == DIM and WIDTH >= 32:
            part = tl.arange(0, WIDTH // 4)
            y0 = load_codes(x, scale, zero, stored, inside, part, DIM, BITS)
            y1 = load_codes(x, scale, zero, stored, inside, part + WIDTH // 4, DIM, BITS)
            y2 = load_codes(x, scale, zero, stored, inside, part + WIDTH // 2, DIM, BITS)
            y3 = load_codes(x, scale, zero, stored, inside, part + 3 * WIDTH // 4, DIM, BITS)
            y = join_quarters(y0, y1, y2, y3)
        else:
            y = load_codes(x, scale, zero, stored, inside, channels, DIM, BITS)
        BLOCK: tl.constexpr = DIM & -DIM if HADAMARD else 1
        y = hadamard(y, BLOCK) * BLOCK**-0.5
        if spread is not None:
            y *= load_scale(spread, channels, DIM, EACH)
        if mean is not None:
            y += rotated_mean(mean, table, at, channels, DIM, PAIRS, INTERLEAVED)
    slot = at - start if SCATTER else token
    there = inside & (slot >= 0) & (slot < size)
    place = out + (row * size + slot)[:, None] * DIM + channels[None, :]
    tl.store(place, y.to(out.dtype.element_ty), mask=there[:, None] & real)


@triton.jit(do_not_specialize=["count0", "count1", "count2", "count3", "start", "size"])
def _dense_kernel(
    segments,  # of each: keys, their scale and zero, values, their scale and zero, positions
    out_keys, out_values, frame, table,
    strides,  # of 16-bit keys and values: batch, head, token
    count0, count1, count2, count3, start, size, heads,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BITS: tl.constexpr,  # of each segment
    SHARED: tl.constexpr,  # whether all rows of the segment have the same positions
    HADAMARD: tl.constexpr, SCATTER: tl.constexpr, FRAME: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of tokens of all segments x batch x heads, keys and values."""
    counts = (count0, count1, count2, count3)
    all_blocks = 0
    for i in tl.static_range(len(BITS)):
        all_blocks += tl.cdiv(counts[i], TOKENS)
    block = tl.program_id(0) % all_blocks
    row = (tl.program_id(0) // all_blocks).to(tl.int64)
    batch, head = row // heads, row % heads
    if frame is not None:
        frame += row * FRAME
    FITTED: tl.constexpr = FRAME > KEY_DIM
    for i in tl.static_range(len(BITS)):
        n = counts[i]
        blocks = tl.cdiv(n, TOKENS)
        if (block >= 0) & (block < blocks):
            key_batch, key_head, key_token, value_batch, value_head, value_token = strides[i]
            keys, key_scale, key_zero, values, value_scale, value_zero, positions = segments[i]
            if not SHARED[i]:
                positions += row * n
            if tl.program_id(1) == 0:
                keys += batch * key_batch + head * key_head
                _decode_tokens(
                    keys, key_token, key_scale, key_zero, positions, frame, frame + KEY_DIM if FITTED else None, table,
                    out_keys, row, block, n, start, size, KEY_DIM, KEY_WIDTH, BITS[i], HADAMARD, PAIRS, INTERLEAVED,
                    True, SCATTER, TOKENS,
                )  # fmt: skip
            else:
                values += batch * value_batch + head * value_head
                _decode_tokens(
                    values, value_token, value_scale, value_zero, positions, frame + 2 * KEY_DIM if FITTED else None,
                    frame + (2 * KEY_DIM + VALUE_DIM) if FITTED else None, None, out_values, row, block, n, start,
                    size, VALUE_DIM, VALUE_WIDTH, BITS[i], HADAMARD, 0, False, False, SCATTER, TOKENS,
                )  # fmt: skip
        block -= blocks


def widths_of(key_dim: int, value_dim: int, elements: int = ELEMENTS) -> dict[str, int]:
    """Sizes of heads and of blocks, as the kernels take them."""
    key_width, value_width = next_power_of_2(key_dim), next_power_of_2(value_dim)
    return {
        "KEY_DIM": key_dim,
        "KEY_WIDTH": key_width,
        "VALUE_DIM": value_dim,
        "VALUE_WIDTH": value_width,
        "TOKENS": max(1, elements // max(key_width, value_width)),
    }


def rotation_of(rotary: Rotary, centred: bool, device: torch.device) -> tuple[torch.Tensor | None, dict[str, int]]:
    """The table of the rotation, and how the kernels are told about it."""
    pairs = len(rotary.inv_freq) if centred else 0
    return turns(rotary, device) if pairs else None, {"PAIRS": pairs, "INTERLEAVED": rotary.interleaved}


def frame_numbers(frame: torch.Tensor | None) -> int:
    """Numbers of the frame of a row and KV head. The kernels know by them whether it is more than the mean of keys."""
    return 0 if frame is None else frame.shape[-1]


def fits(rotary: Rotary, bits: int, *tensors: torch.Tensor) -> bool:
    """Whether the kernels can do it; what they can't is the twin's, errors included."""
    whole = bits in WIDTHS and all(t.shape[-1] % divisor(bits) == 0 for t in tensors)
    return whole and all(t.dtype in DTYPES for t in tensors) and 2 * len(rotary.inv_freq) <= tensors[0].shape[-1]


def decode(
    keys: Quantized,
    values: Quantized,
    positions: torch.Tensor,
    bits: int,
    codec: Codec,
    frame: torch.Tensor | None,
    rotary: Rotary,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `codec.decode`."""
    key_dim, value_dim = keys.codes.shape[-1] * 8 // bits, values.codes.shape[-1] * 8 // bits
    if frame is not None and 2 * len(rotary.inv_freq) > key_dim:
        return twin.decode(keys, values, positions, bits, codec, frame, rotary)
    out = [torch.empty(*positions.shape, dim, device=positions.device) for dim in (key_dim, value_dim)]
    _read([Segment(bits, keys, values, positions)], out, 0, codec, frame, rotary, scatter=False)
    return out[0], out[1]


def dense(
    segments: Sequence[Segment],
    start: int,
    size: int,
    dtype: torch.dtype,
    codec: Codec,
    frame: torch.Tensor | None,
    rotary: Rotary,
    complete: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `codec.dense`, in one launch."""
    dims = twin.dims(segments[0])
    if frame is not None and 2 * len(rotary.inv_freq) > dims[0]:
        return twin.dense(segments, start, size, dtype, codec, frame, rotary, complete)
    positions = segments[0].positions
    new = torch.empty if complete else torch.zeros
    out = [new(*positions.shape[:2], size, dim, dtype=dtype, device=positions.device) for dim in dims]
    _read([s.unpacked() for s in segments if s.tokens], out, start, codec, frame, rotary, scatter=True)
    return out[0], out[1]


def _read(
    segments: Sequence[Segment],
    out: Sequence[torch.Tensor],
    start: int,
    codec: Codec,
    frame: torch.Tensor | None,
    rotary: Rotary,
    scatter: bool,
) -> None:
    """Write the tokens of the segments to `out`, at `position - start` if `scatter`, else in their order."""
    batch, heads, size = out[0].shape[:3]
    table, rotation = rotation_of(rotary, frame is not None, out[0].device)
    sizes = widths_of(out[0].shape[-1], out[1].shape[-1], ELEMENTS // 2)
    for first in range(0, len(segments), SEGMENTS):
        part = [_flat(segment) for segment in segments[first : first + SEGMENTS]]
        counts = [s.positions.shape[-1] for s in segments[first : first + SEGMENTS]]
        blocks = sum(cdiv(n, sizes["TOKENS"]) for n in counts)
        tensors, strides, bits, once = zip(*part, strict=True)
        with on_device(out[0]):
            modes = {"BITS": bits, "SHARED": once, "HADAMARD": codec.hadamard, "SCATTER": scatter}
            modes["FRAME"] = frame_numbers(frame)
            Launcher(_dense_kernel, {**sizes, **modes, **rotation})(
                (blocks * batch * heads, 2),
                {
                    "segments": tensors,
                    "out_keys": out[0],
                    "out_values": out[1],
                    "frame": None if frame is None else frame.contiguous(),
                    "table": table,
                },
                {
                    "strides": strides,
                    **{f"count{i}": counts[i] if i < len(counts) else 0 for i in range(SEGMENTS)},
                    "start": start,
                    "size": size,
                    "heads": heads,
                },
            )


def _parts(stored: Quantized) -> tuple[torch.Tensor | None, ...]:
    return stored.codes, stored.scale, stored.zero


def _flat(segment: Segment) -> tuple[tuple[torch.Tensor | None, ...], tuple[int, ...], int, bool]:
    """Tensors of a segment, strides of 16-bit ones, bits, and whether all rows share their positions."""
    tensors: list[torch.Tensor | None] = []
    strides: list[int] = []
    for side in (segment.keys, segment.values):
        if isinstance(side, Quantized):
            tensors += _parts(Quantized(side.codes.contiguous(), side.affine.contiguous()))
            strides += (0, 0, 0)
        else:
            plain = contiguous_rows(side)
            tensors += (plain, None, None)
            strides += plain.stride()[:3]
    positions = segment.positions
    tensors.append(positions if shared(positions) else positions.contiguous())
    return tuple(tensors), tuple(strides), segment.bits, shared(positions)
