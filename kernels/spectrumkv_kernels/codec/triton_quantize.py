"""Rounding, packing and unpacking inside Triton kernels."""

import triton
import triton.language as tl

ROUND = tl.constexpr(1.5 * 2.0**23)
"""Float32 that leaves no fraction where it is added: rounds to the nearest integer, ties to even."""
FLOAT16_MAX = tl.constexpr(65504.0)


@triton.jit
def store_codes(
    y, codes, scales, zeros, tokens, inside, NORM: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """Quantise `NORM * y`, float32 `[tokens, channels]` of which `DIM` channels are real, as `quantize` does.

    Args:
        codes, scales, zeros: Where to; `zeros` is None for symmetric codes, else the two lie side by side.
        tokens: Their places there.
        inside: Which of them are stored.
    """
    ROWS: tl.constexpr = y.shape[0]
    WIDTH: tl.constexpr = y.shape[1]
    PARTS: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = DIM // PARTS
    TOP: tl.constexpr = 2**BITS - 1
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    STEP: tl.constexpr = 1 if zeros is None else 2
    finite = tl.sum(tl.abs(y), 1) < float("inf")  # minima and maxima pass over NaN
    if zeros is None:
        scale = tl.max(tl.abs(y), 1) * NORM * (1 / (MIDDLE - 1))
        zero = tl.zeros([ROWS], tl.float32)
        offset = ROUND + MIDDLE
        lowest = ROUND + 1
    else:
        real = (tl.arange(0, WIDTH) < DIM)[None, :]
        low = tl.where(finite, tl.min(tl.where(real, y, float("inf")), 1) * NORM, 0.0)
        high = tl.max(tl.where(real, y, float("-inf")), 1) * NORM
        scale = (high - low) * (1 / TOP)
        stored = tl.minimum(tl.maximum(low, -FLOAT16_MAX), FLOAT16_MAX).to(tl.float16)
        tl.store(zeros + tokens * STEP, stored, mask=inside)
        zero = stored.to(tl.float32)
        offset = ROUND
        lowest = ROUND
    scale = tl.where(finite, tl.minimum(scale, FLOAT16_MAX), FLOAT16_MAX).to(tl.float16)
    tl.store(scales + tokens * STEP, scale, mask=inside)
    step = scale.to(tl.float32)
    inverse = tl.where(step > 0, 1.0 / tl.where(step > 0, step, 1.0), 0.0)
    y = (y * NORM - zero[:, None]) * inverse[:, None] + offset
    code = tl.minimum(tl.maximum(y, lowest), ROUND + TOP).to(tl.uint32, bitcast=True)  # in the lowest byte

    if WIDTH == DIM:
        byte = tl.arange(0, BYTES)
        shift = BITS * tl.arange(0, PARTS)[None, :, None]
        packed = tl.sum(tl.reshape(code, [ROWS, PARTS, BYTES]) << shift, 1)  # no bits overlap: a sum is an "or"
    else:
        byte = tl.arange(0, WIDTH)
        packed = code
        for part in tl.static_range(1, PARTS):
            there = tl.broadcast_to(tl.minimum(byte + part * BYTES, WIDTH - 1)[None, :], [ROWS, WIDTH])
            packed += tl.gather(code, there, 1) << (BITS * part)
    place = codes + tokens[:, None] * BYTES + byte[None, :]
    tl.store(place, (packed & 255).to(tl.uint8), mask=inside[:, None] & (byte < BYTES)[None, :])


@triton.jit
def load_codes(codes, scale, zero, tokens, inside, channels, DIM: tl.constexpr, BITS: tl.constexpr):
    """`codes * scale + zero` at these channels: float32 `[tokens, channels]`, 0 for channels past `DIM`."""
    BYTES: tl.constexpr = DIM * BITS // 8
    real = (channels < DIM)[None, :]
    place = codes + tokens[:, None] * BYTES + (channels % BYTES)[None, :]
    packed = tl.load(place, mask=inside[:, None] & real, other=0).to(tl.int32)
    code = (packed >> (channels // BYTES * BITS)[None, :]) & (2**BITS - 1)
    return tl.where(real, code.to(tl.float32) * scale[:, None] + zero[:, None], 0.0)
