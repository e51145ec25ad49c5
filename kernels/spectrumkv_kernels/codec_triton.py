"""Triton twins of `spectrumkv_kernels.codec`."""

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from spectrumkv_kernels import codec as twin
from spectrumkv_kernels.attention import Segment
from spectrumkv_kernels.codec import Codec
from spectrumkv_kernels.hadamard_triton import hadamard, join_quarters
from spectrumkv_kernels.quantize import Quantized
from spectrumkv_kernels.rotary import Rotary
from spectrumkv_kernels.rotary_triton import partner, rotated_mean, turn

ELEMENTS = 4096
"""Of a block of tokens and channels, for 4 warps."""
SPLIT = 512
"""Tokens that one program of `key_mean` sums up."""
SEGMENTS = 4
"""Most segments of one launch."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUND = tl.constexpr(1.5 * 2.0**23)
"""Adding it to a small float32 leaves no fraction: rounds to the nearest integer, ties to even."""
FLOAT16_MAX = tl.constexpr(65504.0)


@triton.jit
def _load_part(
    x,  # of each token
    inside,
    positions,
    mean,
    factors,
    part,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Channels `part * WIDTH` and on of the tokens, less those of `R(t) mean`: float32 `[tokens, WIDTH]`."""
    channels = part * WIDTH + tl.arange(0, WIDTH)
    y = tl.load(x + channels[None, :], mask=inside[:, None] & (channels < DIM)[None, :], other=0.0).to(tl.float32)
    if mean is not None:
        y -= rotated_mean(mean, factors, positions, channels, DIM, PAIRS, INTERLEAVED)
    return y


@triton.jit
def _encode_tokens(
    x,  # the row's first token
    stride,
    index,
    positions,
    mean,
    factors,
    codes,
    scales,
    zeros,
    first,  # of the row's tokens in codes, scales and zeros
    n,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # DIM, rounded up to a power of two
    BITS: tl.constexpr,
    HADAMARD: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Quantise `TOKENS` tokens of one row of keys or values."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < n
    source = token.to(tl.int64) if index is None else tl.load(index + token, mask=inside, other=0)
    real = (tl.arange(0, WIDTH) < DIM)[None, :]
    at = tl.load(positions + first + token, mask=inside, other=0) if mean is not None else token
    x += source[:, None] * stride
    if WIDTH == DIM and WIDTH >= 32:
        QUARTER: tl.constexpr = WIDTH // 4
        y0 = _load_part(x, inside, at, mean, factors, 0, QUARTER, DIM, PAIRS, INTERLEAVED)
        y1 = _load_part(x, inside, at, mean, factors, 1, QUARTER, DIM, PAIRS, INTERLEAVED)
        y2 = _load_part(x, inside, at, mean, factors, 2, QUARTER, DIM, PAIRS, INTERLEAVED)
        y3 = _load_part(x, inside, at, mean, factors, 3, QUARTER, DIM, PAIRS, INTERLEAVED)
        y = join_quarters(y0, y1, y2, y3)
    else:
        y = _load_part(x, inside, at, mean, factors, 0, WIDTH, DIM, PAIRS, INTERLEAVED)
    if HADAMARD:
        y = hadamard(y, TOKENS, WIDTH, DIM & -DIM)
    NORM: tl.constexpr = (DIM & -DIM) ** -0.5 if HADAMARD else 1.0

    TOP: tl.constexpr = 2**BITS - 1
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    if zeros is None:
        scale = tl.max(tl.abs(y), 1) * NORM * (1 / (MIDDLE - 1))
        zero = tl.zeros([TOKENS], tl.float32)
        offset = ROUND + MIDDLE
        lowest = ROUND + 1
    else:
        low = tl.min(tl.where(real, y, float("inf")), 1) * NORM
        high = tl.max(tl.where(real, y, float("-inf")), 1) * NORM
        scale = (high - low) * (1 / TOP)
        zero = tl.minimum(tl.maximum(low, -FLOAT16_MAX), FLOAT16_MAX).to(tl.float16)
        tl.store(zeros + first + token, zero, mask=inside)
        zero = zero.to(tl.float32)
        offset = ROUND
        lowest = ROUND
    scale = tl.minimum(scale, FLOAT16_MAX).to(tl.float16)
    tl.store(scales + first + token, scale, mask=inside)
    steps = scale.to(tl.float32)
    inverse = tl.where(steps > 0, 1.0 / tl.where(steps > 0, steps, 1.0), 0.0)
    y = (y * NORM - zero[:, None]) * inverse[:, None] + offset
    code = tl.minimum(tl.maximum(y, lowest), ROUND + TOP).to(tl.uint32, bitcast=True)  # in the lowest byte

    PARTS: tl.constexpr = 8 // BITS
    if WIDTH == DIM:
        shift = BITS * tl.arange(0, PARTS)[None, :, None]
        packed = tl.sum(tl.reshape(code, [TOKENS, PARTS, WIDTH // PARTS]) << shift, 1)
        byte = tl.arange(0, WIDTH // PARTS)
    else:
        byte = tl.arange(0, WIDTH)
        packed = code
        for part in tl.static_range(1, PARTS):
            there = tl.broadcast_to(tl.minimum(byte + part * (DIM // PARTS), WIDTH - 1)[None, :], [TOKENS, WIDTH])
            packed += tl.gather(code, there, 1) << (BITS * part)
    place = (first + token)[:, None] * (DIM // PARTS) + byte[None, :]
    tl.store(codes + place, (packed & 255).to(tl.uint8), mask=inside[:, None] & (byte < DIM // PARTS)[None, :])


@triton.jit(do_not_specialize=["n", "index_batch", "index_head"])
def _encode_kernel(
    keys,
    values,
    index,
    positions,
    mean,
    factors,
    key_codes,
    key_scale,
    key_zero,
    value_codes,
    value_scale,
    value_zero,
    n,
    heads,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    index_batch,
    index_head,
    KEY_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    HADAMARD: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Grid: blocks of tokens, batch x heads, keys and values."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    first = row * n
    if index is not None:
        index += batch * index_batch + head * index_head
    if tl.program_id(2) == 0:
        keys += batch * key_batch + head * key_head
        if mean is not None:
            mean += row * KEY_DIM
        _encode_tokens(
            keys, key_token, index, positions, mean, factors, key_codes, key_scale, key_zero, first, n,
            KEY_DIM, KEY_WIDTH, BITS, HADAMARD, PAIRS, INTERLEAVED, TOKENS,
        )  # fmt: skip
    else:
        values += batch * value_batch + head * value_head
        _encode_tokens(
            values, value_token, index, positions, None, None, value_codes, value_scale, value_zero, first, n,
            VALUE_DIM, VALUE_WIDTH, BITS, HADAMARD, PAIRS, INTERLEAVED, TOKENS,
        )  # fmt: skip


@triton.jit
def _load_codes(codes, tokens, inside, scale, zero, part, WIDTH: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr):
    """Channels `part * WIDTH` and on of coded tokens, float32 `[tokens, WIDTH]`."""
    BYTES: tl.constexpr = DIM * BITS // 8
    channels = part * WIDTH + tl.arange(0, WIDTH)
    place = codes + tokens[:, None] * BYTES + (channels % BYTES)[None, :]
    packed = tl.load(place, mask=inside[:, None] & (channels < DIM)[None, :], other=0)
    code = (packed.to(tl.int32) >> (channels // BYTES * BITS)[None, :]) & (2**BITS - 1)
    return tl.where((channels < DIM)[None, :], code.to(tl.float32) * scale[:, None] + zero[:, None], 0.0)


@triton.jit
def _decode_tokens(
    x, scales, zeros, positions, mean, factors, out, row, block, n, start, size, stride,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    HADAMARD: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SCATTER: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Write keys or values of `TOKENS` tokens of one row and segment to where they belong."""
    token = block * TOKENS + tl.arange(0, TOKENS)
    inside = token < n
    at = tl.load(positions + token, mask=inside, other=-1)
    channels = tl.arange(0, WIDTH)
    if BITS == 16:
        y = tl.load(
            x + token.to(tl.int64)[:, None] * stride + channels[None, :],
            mask=inside[:, None] & (channels < DIM)[None, :],
            other=0.0,
        )
    else:
        stored = row * n + token
        scale = tl.load(scales + stored, mask=inside, other=0.0).to(tl.float32)
        if zeros is None:
            zero = scale * -(2.0 ** (BITS - 1))
        else:
            zero = tl.load(zeros + stored, mask=inside, other=0.0).to(tl.float32)
        if WIDTH == DIM and WIDTH >= 32:
            y0 = _load_codes(x, stored, inside, scale, zero, 0, WIDTH // 4, DIM, BITS)
            y1 = _load_codes(x, stored, inside, scale, zero, 1, WIDTH // 4, DIM, BITS)
            y2 = _load_codes(x, stored, inside, scale, zero, 2, WIDTH // 4, DIM, BITS)
            y3 = _load_codes(x, stored, inside, scale, zero, 3, WIDTH // 4, DIM, BITS)
            y = join_quarters(y0, y1, y2, y3)
        else:
            y = _load_codes(x, stored, inside, scale, zero, 0, WIDTH, DIM, BITS)
        if HADAMARD:
            y = hadamard(y, TOKENS, WIDTH, DIM & -DIM) * (DIM & -DIM) ** -0.5
        if mean is not None:
            y += rotated_mean(mean, factors, at, channels, DIM, PAIRS, INTERLEAVED)
    slot = token
    if SCATTER:
        slot = at - start
    there = inside & (slot >= 0) & (slot < size)
    place = out + (row * size + slot)[:, None] * DIM + channels[None, :]
    tl.store(place, y.to(out.dtype.element_ty), mask=there[:, None] & (channels < DIM)[None, :])


@triton.jit(do_not_specialize=["count0", "count1", "count2", "count3", "start", "size"])
def _dense_kernel(
    segments,  # of each: keys, their scale and zero, values, their scale and zero, positions
    strides,  # of 16-bit keys and values: batch, head, token
    count0,
    count1,
    count2,
    count3,
    out_keys,
    out_values,
    mean,
    factors,
    start,
    size,
    heads,
    BITS: tl.constexpr,  # of each segment
    SHARED: tl.constexpr,  # whether all rows of the segment have the same positions
    KEY_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    HADAMARD: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SCATTER: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Grid: blocks of tokens of all segments, batch x heads, keys and values."""
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    counts = (count0, count1, count2, count3)
    for i in tl.static_range(len(BITS)):
        n = counts[i]
        blocks = tl.cdiv(n, TOKENS)
        if (block >= 0) & (block < blocks):
            key_batch, key_head, key_token, value_batch, value_head, value_token = strides[i]
            keys, key_scale, key_zero, values, value_scale, value_zero, positions = segments[i]
            if not SHARED[i]:
                positions += row * n
            if tl.program_id(2) == 0:
                keys += batch * key_batch + head * key_head
                if mean is not None:
                    mean += row * KEY_DIM
                _decode_tokens(
                    keys, key_scale, key_zero, positions, mean, factors, out_keys, row, block, n, start, size,
                    key_token, KEY_DIM, KEY_WIDTH, BITS[i], HADAMARD, PAIRS, INTERLEAVED, SCATTER, TOKENS,
                )  # fmt: skip
            else:
                values += batch * value_batch + head * value_head
                _decode_tokens(
                    values, value_scale, value_zero, positions, None, None, out_values, row, block, n, start,
                    size, value_token, VALUE_DIM, VALUE_WIDTH, BITS[i], HADAMARD, PAIRS, INTERLEAVED, SCATTER, TOKENS,
                )  # fmt: skip
        block -= blocks


@triton.jit(do_not_specialize=["tokens"])
def _sums_kernel(
    keys, positions, weights, factors, sums, tokens, heads, batch_stride, head_stride, token_stride,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Sums over `SPLIT` tokens of keys times cosine and keys times sine. Grid: splits, batch x heads."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    keys += batch * batch_stride + head * head_stride
    channels = tl.arange(0, WIDTH)
    along = tl.zeros([TOKENS, WIDTH], tl.float32)
    across = tl.zeros([TOKENS, WIDTH], tl.float32)
    for i in range(SPLIT // TOKENS):
        token = tl.program_id(0) * SPLIT + i * TOKENS + tl.arange(0, TOKENS)
        inside = token < tokens
        place = keys + token.to(tl.int64)[:, None] * token_stride + channels[None, :]
        x = tl.load(place, mask=inside[:, None] & (channels < DIM)[None, :], other=0.0).to(tl.float32)
        if weights is not None:
            x *= tl.load(weights + batch * tokens + token, mask=inside, other=0.0)[:, None]
        if PAIRS:
            at = tl.load(positions + token, mask=inside, other=0)
            cos, sin = turn(factors, at, channels, PAIRS, INTERLEAVED)
            along += x * cos
            across += x * sin
        else:
            along += x
    sums += (row * tl.num_programs(0) + tl.program_id(0)) * 2 * WIDTH
    tl.store(sums + channels, tl.sum(along, 0))
    if PAIRS:
        tl.store(sums + WIDTH + channels, tl.sum(across, 0))


@triton.jit(do_not_specialize=["splits"])
def _mean_kernel(
    sums, total, mean, splits, heads,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Mean of the splits' sums, turned back. Grid: batch x heads."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, WIDTH)
    acc = tl.zeros([SPLITS, WIDTH], tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        place = sums + (row * splits + split)[:, None] * 2 * WIDTH
        acc += tl.load(place + channels[None, :], mask=(split < splits)[:, None], other=0.0)
        if PAIRS:
            other, sign = partner(channels, PAIRS, INTERLEAVED)
            turned = (split < splits)[:, None] & (channels < 2 * PAIRS)[None, :]
            acc -= tl.load(place + WIDTH + other[None, :], mask=turned, other=0.0) * sign[None, :]
    weight = tl.load(total + row // heads)
    weight = tl.where(weight > 0, weight, 1.0)
    tl.store(mean + row * DIM + channels, tl.sum(acc, 0) / weight, mask=channels < DIM)


def _on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _widths(key_dim: int, value_dim: int, elements: int = ELEMENTS) -> dict[str, int]:
    """Sizes of heads and of blocks, as the kernels take them."""
    key_width, value_width = triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim)
    return {
        "KEY_DIM": key_dim,
        "KEY_WIDTH": key_width,
        "VALUE_DIM": value_dim,
        "VALUE_WIDTH": value_width,
        "TOKENS": max(1, elements // max(key_width, value_width)),
    }


def _rotation(rotary: Rotary, centred: bool, device: torch.device) -> tuple[torch.Tensor | None, dict[str, int]]:
    """The tables of the rotation, and how the kernels are told about them."""
    pairs = len(rotary.inv_freq) if centred else 0
    return rotary.factors(device) if pairs else None, {"PAIRS": pairs, "INTERLEAVED": rotary.interleaved}


def _fits(rotary: Rotary, bits: int, *tensors: torch.Tensor) -> bool:
    """Whether the kernels can do it; what they can't is the twin's, errors included."""
    whole = bits in (2, 4, 8) and all(t.shape[-1] * bits % 8 == 0 for t in tensors)
    return whole and all(t.dtype in DTYPES for t in tensors) and 2 * len(rotary.inv_freq) <= tensors[0].shape[-1]


def _dense_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def key_mean(
    keys: torch.Tensor, positions: torch.Tensor, rotary: Rotary, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """As `codec.key_mean`. Reads the keys once; splits of the tokens are summed in a fixed order."""
    batch, heads, tokens, dim = keys.shape
    if not _fits(rotary, 8, keys) or not keys.numel():
        return twin.key_mean(keys, positions, rotary, weights)
    keys, positions = _dense_last(keys), positions.contiguous()
    factors, rotation = _rotation(rotary, True, keys.device)
    width, splits = triton.next_power_of_2(dim), triton.cdiv(tokens, SPLIT)
    if weights is None:
        total = torch.full((batch,), float(tokens), device=keys.device)
    else:
        weights = weights.float().contiguous()
        total = weights.sum(-1)
    sums = torch.empty(batch, heads, splits, 2, width, dtype=torch.float32, device=keys.device)
    mean = torch.empty(batch, heads, dim, dtype=torch.float32, device=keys.device)
    sizes = {"DIM": dim, "WIDTH": width, **rotation}
    with _on(keys):
        _sums_kernel[splits, batch * heads](
            keys, positions, weights, factors, sums, tokens, heads, *keys.stride()[:3],
            TOKENS=max(1, ELEMENTS // 2 // width), SPLIT=max(SPLIT, 1), **sizes,
        )  # fmt: skip
        _mean_kernel[(batch * heads,)](sums, total, mean, splits, heads, SPLITS=max(1, ELEMENTS // 2 // width), **sizes)
    return mean


def encode(
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    bits: int,
    codec: Codec,
    mean: torch.Tensor | None,
    rotary: Rotary,
    index: torch.Tensor | None = None,
) -> tuple[Quantized, Quantized]:
    """As `codec.encode`. Reads the tokens once."""
    if not _fits(rotary, bits, keys, values):
        return twin.encode(keys, values, positions, bits, codec, mean, rotary, index)
    batch, heads, n = positions.shape
    keys, values = _dense_last(keys), _dense_last(values)
    index = None if index is None else _dense_last(index)
    factors, rotation = _rotation(rotary, mean is not None, keys.device)

    def allocate(dim: int) -> Quantized:
        codes = torch.empty(batch, heads, n, dim * bits // 8, dtype=torch.uint8, device=keys.device)
        scale = torch.empty(batch, heads, n, dtype=torch.float16, device=keys.device)
        return Quantized(codes, scale, None if codec.symmetric else torch.empty_like(scale))

    sizes = _widths(keys.shape[-1], values.shape[-1])
    k, v = allocate(keys.shape[-1]), allocate(values.shape[-1])
    with _on(keys):
        _encode_kernel[triton.cdiv(n, sizes["TOKENS"]), batch * heads, 2](
            keys, values, index, positions.contiguous(), None if mean is None else mean.contiguous(), factors, *k, *v,
            n, heads, *keys.stride()[:3], *values.stride()[:3], *((0, 0) if index is None else index.stride()[:2]),
            BITS=bits, HADAMARD=codec.hadamard, **sizes, **rotation,
        )  # fmt: skip
    return k, v


def decode(
    keys: Quantized,
    values: Quantized,
    positions: torch.Tensor,
    bits: int,
    codec: Codec,
    mean: torch.Tensor | None,
    rotary: Rotary,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `codec.decode`."""
    key_dim, value_dim = keys.codes.shape[-1] * 8 // bits, values.codes.shape[-1] * 8 // bits
    if mean is not None and 2 * len(rotary.inv_freq) > key_dim:
        return twin.decode(keys, values, positions, bits, codec, mean, rotary)
    out = [torch.empty(*positions.shape, dim, device=positions.device) for dim in (key_dim, value_dim)]
    _read([Segment(bits, keys, values, positions)], out, 0, codec, mean, rotary, scatter=False)
    return out[0], out[1]


def dense(
    segments: Sequence[Segment],
    start: int,
    size: int,
    dtype: torch.dtype,
    codec: Codec,
    mean: torch.Tensor | None,
    rotary: Rotary,
    complete: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `codec.dense`, in one launch."""
    dims = twin.dims(segments[0])
    if mean is not None and 2 * len(rotary.inv_freq) > dims[0]:
        return twin.dense(segments, start, size, dtype, codec, mean, rotary, complete)
    positions = segments[0].positions
    new = torch.empty if complete else torch.zeros
    out = [new(*positions.shape[:2], size, dim, dtype=dtype, device=positions.device) for dim in dims]
    _read([s for s in segments if s.positions.shape[-1]], out, start, codec, mean, rotary, scatter=True)
    return out[0], out[1]


def _read(
    segments: Sequence[Segment],
    out: Sequence[torch.Tensor],
    start: int,
    codec: Codec,
    mean: torch.Tensor | None,
    rotary: Rotary,
    scatter: bool,
) -> None:
    """Write the tokens of the segments to `out`, at `position - start` if `scatter`, else in their order."""
    batch, heads, size = out[0].shape[:3]
    factors, rotation = _rotation(rotary, mean is not None, out[0].device)
    sizes = _widths(out[0].shape[-1], out[1].shape[-1], ELEMENTS // 2)
    for first in range(0, len(segments), SEGMENTS):
        part = [_flat(segment) for segment in segments[first : first + SEGMENTS]]
        counts = [s.positions.shape[-1] for s in segments[first : first + SEGMENTS]]
        blocks = sum(triton.cdiv(n, sizes["TOKENS"]) for n in counts)
        tensors, strides, bits, shared = zip(*part, strict=True)
        with _on(out[0]):
            _dense_kernel[blocks, batch * heads, 2](
                tensors, strides, *counts, *[0] * (SEGMENTS - len(counts)), *out,
                None if mean is None else mean.contiguous(), factors, start, size, heads,
                BITS=bits, SHARED=shared, HADAMARD=codec.hadamard, SCATTER=scatter, **sizes, **rotation,
            )  # fmt: skip


def _flat(segment: Segment) -> tuple[tuple[torch.Tensor | None, ...], tuple[int, ...], int, bool]:
    """Tensors of a segment, strides of 16-bit ones, bits, and whether all rows share their positions."""
    tensors: list[torch.Tensor | None] = []
    strides: list[int] = []
    for side in (segment.keys, segment.values):
        if isinstance(side, Quantized):
            tensors += (None if t is None else t.contiguous() for t in side)
            strides += (0, 0, 0)
        else:
            plain = _dense_last(side)
            tensors += (plain, None, None)
            strides += plain.stride()[:3]
    positions = segment.positions
    shared = positions.stride() == (0, 0, 1)
    tensors.append(positions if shared else positions.contiguous())
    return tuple(tensors), tuple(strides), segment.bits, shared
