"""Rounding, packing and unpacking inside Triton kernels."""

import math

import triton
import triton.language as tl

from . import quantize

ROUND = tl.constexpr(1.5 * 2.0**23)
"""Float32 that leaves no fraction where it is added: rounds to the nearest integer, ties to even."""
FLOAT16_MAX = tl.constexpr(65504.0)
OCTAVE, SATURATED = tl.constexpr(quantize.OCTAVE), tl.constexpr(quantize.SATURATED)
TRIES = tl.constexpr(len(quantize.TRIED))
CONSTANTS = {
    "middle": {bits: 2 ** (bits - 1) for bits in quantize.WIDTHS},
    "top": {bits: 2**bits - 1 for bits in quantize.WIDTHS},
    # Binary logarithm of the scale that the byte 0 stands for.
    "smallest": {bits: math.log2(quantize.unit(bits)) - quantize.ONE / quantize.OCTAVE for bits in quantize.WIDTHS},
    "symmetric": {bits: 1 / (2 ** (bits - 1) - 1) for bits in quantize.WIDTHS if bits > 1},  # of the largest channel
    "asymmetric": {bits: 1 / (2**bits - 1) for bits in quantize.WIDTHS},  # of the distance of the outermost channels
    "step": quantize.STEPS | {8: 0.0},
}
"""What depends on the bits of a code."""


@triton.constexpr_function
def _constant(name, bits):
    return float(CONSTANTS[name][bits])


@triton.constexpr_function
def _tried(i):
    return quantize.TRIED[i]


@triton.constexpr_function
def _among(bits, widths):
    return bits in widths


@triton.jit
def _of(bits, NAME: tl.constexpr, WIDTHS: tl.constexpr):
    """One of `CONSTANTS` for `bits`, which are one of `WIDTHS`."""
    value = _constant(NAME, WIDTHS[0])
    for i in tl.static_range(1, len(WIDTHS)):
        value = tl.where(bits == WIDTHS[i], _constant(NAME, WIDTHS[i]), value)
    return value


@triton.jit
def is_sound(x):
    """Which of these vectors float16 holds, of float32 `[tokens, channels]`: bool `[tokens]`; for `quantize.sound`."""
    return tl.sum((tl.abs(x) <= FLOAT16_MAX).to(tl.int32), 1) == x.shape[1]  # not so of NaN


@triton.jit
def sound(x, wanted, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Which of the wanted vectors, that begin at `x`, float16 holds: bool `[tokens]`."""
    channels = tl.arange(0, WIDTH)
    there = wanted[:, None] & (channels < DIM)[None, :]
    y = tl.load(x[:, None] + channels[None, :], mask=there, other=0.0).to(tl.float32)
    return wanted & is_sound(y)


@triton.jit
def store_codes(
    y, codes, scales, zeros, tokens, inside, bits, NORM: tl.constexpr, DIM: tl.constexpr, WIDTHS: tl.constexpr
):  # fmt: skip
    """Quantise `NORM * y`, float32 `[tokens, channels]` of which `DIM` channels are real.

    How many bits codes have is decided on the device: a kernel that serves all tiers has this code once, and takes as
    long to compile as for one of them.

    Args:
        codes, scales, zeros: Where to. Where `scales` are bytes it is done as `quantize_unbiased` does, else as
            `quantize`: `zeros` is None for symmetric codes, else the two lie side by side.
        tokens: Their places there.
        inside: Which of them are stored.
        bits: One of `WIDTHS`.

    Returns:
        Which tokens are not represented, bool `[tokens]`.
    """
    if scales.dtype.element_ty == tl.uint8:
        code, lost = _unbiased(y * NORM, scales, tokens, inside, bits, DIM, WIDTHS)
    else:
        code, lost = _nearest(y, scales, zeros, tokens, inside, bits, NORM, DIM, WIDTHS)
    for i in tl.static_range(len(WIDTHS)):
        if bits == WIDTHS[i]:
            _pack_all(code, codes, tokens, inside, DIM, WIDTHS[i])
    return lost


@triton.jit
def _pack_all(code, codes, tokens, inside, DIM: tl.constexpr, BITS: tl.constexpr):
    """Store codes, in the lowest bytes of uint32 `[tokens, channels]`."""
    SIZE: tl.constexpr = DIM * BITS // 8
    if BITS == 3:
        _pack(code >> 1, codes, tokens, inside, SIZE, DIM, 2)
        _pack(code & 1, codes + DIM // 4, tokens, inside, SIZE, DIM, 1)
    else:
        _pack(code, codes, tokens, inside, SIZE, DIM, BITS)


@triton.jit
def _nearest(
    y, scales, zeros, tokens, inside, bits, NORM: tl.constexpr, DIM: tl.constexpr, WIDTHS: tl.constexpr
):  # fmt: skip
    """Codes of `NORM * y`, in the lowest bytes of uint32 `[tokens, channels]`, and which tokens are not represented;
    scales and zeros are stored."""
    STEP: tl.constexpr = 1 if zeros is None else 2
    finite = tl.sum(tl.abs(y), 1) < float("inf")  # minima and maxima pass over NaN
    if zeros is None:
        scale = tl.max(tl.abs(y), 1) * NORM * _of(bits, "symmetric", WIDTHS)
        zero = tl.zeros([y.shape[0]], tl.float32)
        offset = ROUND + _of(bits, "middle", WIDTHS)
        lowest = ROUND + 1
    else:
        real = (tl.arange(0, y.shape[1]) < DIM)[None, :]
        low = tl.where(finite, tl.min(tl.where(real, y, float("inf")), 1) * NORM, 0.0)
        high = tl.max(tl.where(real, y, float("-inf")), 1) * NORM
        scale = (high - low) * _of(bits, "asymmetric", WIDTHS)
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
    lost = tl.maximum(step, tl.abs(zero)) >= FLOAT16_MAX
    highest = ROUND + _of(bits, "top", WIDTHS)
    return tl.minimum(tl.maximum(y, lowest), highest).to(tl.uint32, bitcast=True), lost


@triton.jit
def _unbiased(x, scales, tokens, inside, bits, DIM: tl.constexpr, WIDTHS: tl.constexpr):
    """Codes of `x`, in the lowest bytes of uint32 `[tokens, channels]`, and which tokens are not represented; the bytes
    of their scales are stored."""
    middle, smallest = _of(bits, "middle", WIDTHS), _of(bits, "smallest", WIDTHS)
    step = tl.zeros([x.shape[0]], tl.float32)
    byte = tl.zeros([x.shape[0]], tl.uint8)
    if _among(8, WIDTHS):  # noqa: SIM102  # one condition is for the compiler, the other for the device
        if bits == 8:
            finite = tl.sum(tl.abs(x), 1) < float("inf")  # maxima pass over NaN
            most = tl.where(finite, tl.max(tl.abs(x), 1), float("inf"))
            byte = _byte(tl.ceil(_exponent(most * (1 / 127.5), smallest)))
            step = _scale_of(byte, smallest)
    if not (_among(8, WIDTHS) and len(WIDTHS) == 1):  # noqa: SIM102
        if bits != 8:
            real = (tl.arange(0, x.shape[1]) < DIM)[None, :]
            square = tl.sum(x * x, 1)
            root = tl.sqrt(square * (1 / DIM)) * _of(bits, "step", WIDTHS)
            along = tl.zeros([x.shape[0]], tl.float32)
            best = tl.zeros([x.shape[0]], tl.float32)
            for i in tl.static_range(TRIES):
                tried = root * _tried(i)
                levels = tl.where(real, _floor(x, tried, middle) + 0.5, 0.0)
                product = tl.sum(x * levels, 1)
                gain = product * product / tl.sum(levels * levels, 1)
                better = gain > best
                step = tl.where(better, tried, step)
                along = tl.where(better, product, along)
                best = tl.where(better, gain, best)
            scale = square / tl.where(along > 0, along, float("inf"))
            byte = _byte(_exponent(tl.where(square < float("inf"), scale, float("inf")), smallest))
    tl.store(scales + tokens, byte, mask=inside)
    return (_floor(x, step, middle) + (ROUND + middle)).to(tl.uint32, bitcast=True), byte == SATURATED


@triton.jit
def _floor(x, step, middle):
    """`x` in units of the vectors' steps, rounded down to what a code can stand for: float32 `[tokens, channels]`."""
    inverse = tl.where(step > 0, 1.0 / tl.where(step > 0, step, 1.0), 0.0)
    return tl.minimum(tl.maximum(tl.floor(x * inverse[:, None]), -middle), middle - 1)


@triton.jit
def _exponent(scale, smallest):
    """The byte of a scale, before it is rounded and clamped. What is below any scale, 0 too, has one below 0."""
    return (tl.log2(tl.maximum(scale, 2.0**-100)) - smallest) * OCTAVE


@triton.jit
def _byte(exponent):
    """Rounded to the nearest byte; what is beyond the largest scale takes the one of what is not represented."""
    byte = tl.where(exponent <= SATURATED - 0.5, tl.maximum(exponent, 0.0), SATURATED) + ROUND
    return (byte.to(tl.uint32, bitcast=True) & 255).to(tl.uint8)


@triton.jit
def _pack(code, codes, tokens, inside, SIZE: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr):
    """Store codes, in the lowest bytes of uint32 `[tokens, channels]`, for vectors that are `SIZE` bytes apart."""
    ROWS: tl.constexpr = code.shape[0]
    WIDTH: tl.constexpr = code.shape[1]
    PARTS: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = DIM // PARTS
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
    place = codes + tokens[:, None] * SIZE + byte[None, :]
    tl.store(place, (packed & 255).to(tl.uint8), mask=inside[:, None] & (byte < BYTES)[None, :])


@triton.jit
def _scale_of(byte, smallest):
    return tl.exp2(byte.to(tl.float32) * (1 / OCTAVE) + smallest)


@triton.constexpr_function
def zero_of(bits, scales):
    """The zero of codes that store none, over their scale; `scales` is where that lies."""
    return (0.5 if scales.element_ty == tl.uint8 else 0.0) - 2.0 ** (bits - 1)


@triton.jit
def scale_of(byte, BITS: tl.constexpr):
    """The scales that bytes stand for, float32."""
    return _scale_of(byte, _constant("smallest", BITS))


@triton.jit
def load_affine(scales, zeros, tokens, inside, BITS: tl.constexpr):
    """Scale and zero of tokens, float32; `zeros` is None for codes that store none."""
    STEP: tl.constexpr = 1 if zeros is None else 2
    scale = tl.load(scales + tokens * STEP, mask=inside, other=0)
    scale = scale_of(scale, BITS) if scales.dtype.element_ty == tl.uint8 else scale.to(tl.float32)
    if zeros is None:
        zero = scale * zero_of(BITS, scales.dtype)
    else:
        zero = tl.load(zeros + tokens * STEP, mask=inside, other=0).to(tl.float32)
    return scale, zero


@triton.jit
def load_codes(codes, scale, zero, tokens, inside, channels, DIM: tl.constexpr, BITS: tl.constexpr):
    """`codes * scale + zero` at these channels: float32 `[tokens, channels]`, 0 for channels past `DIM`."""
    real = (channels < DIM)[None, :]
    first = codes + tokens[:, None] * (DIM * BITS // 8)
    there = inside[:, None] & real
    if BITS == 3:
        code = _unpack(first, there, channels, DIM, 2) << 1 | _unpack(first + DIM // 4, there, channels, DIM, 1)
    else:
        code = _unpack(first, there, channels, DIM, BITS)
    return tl.where(real, code.to(tl.float32) * scale[:, None] + zero[:, None], 0.0)


@triton.jit
def _unpack(first, there, channels, DIM: tl.constexpr, BITS: tl.constexpr):
    """The codes of vectors that begin at `first`, `[tokens, 1]`, at these channels: int32 `[tokens, channels]`."""
    BYTES: tl.constexpr = DIM * BITS // 8
    packed = tl.load(first + (channels % BYTES)[None, :], mask=there, other=0).to(tl.int32)
    return (packed >> (channels // BYTES * BITS)[None, :]) & (2**BITS - 1)
