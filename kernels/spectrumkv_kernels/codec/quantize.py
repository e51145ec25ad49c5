"""Quantisation per token and head, and the packed layout of its codes."""

import math
from typing import NamedTuple

import torch

from ..backend.tensor_cache import keep

FLOAT16_MAX = torch.finfo(torch.float16).max
WIDTHS = (1, 2, 3, 4, 8)
"""Bits of a code."""
STEPS = {1: 1.596, 2: 0.9957, 3: 0.586, 4: 0.3352}
"""Of uniform codes, in units of the root mean square: where the squared error of a normal variable is least. Codes of 1
bit are signs, whatever the step."""
TRIED = (0.85, 1.0, 1.15)
"""Multiples of that step, of which each vector takes the best: for 64 channels of 4 bits the squared error falls by
13 %, and five of them would bring 3 % more."""
OCTAVE = 32
"""Steps of a one-byte scale to a factor of 2: it is off by 1.1 % at most."""
ONE = 128
"""The byte of the scale `unit(bits)`."""
SATURATED = 255
"""The byte of what is not represented."""


class Quantized(NamedTuple):
    """Vectors stored as packed integer codes: `x ~ codes * scale + zero`.

    Attributes:
        codes: uint8 `[..., channels * bits / 8]`. With `w = channels * bits / 8`, byte `i` holds channels
            `i, i + w, i + 2w, ...` from its lowest bits up, so INT4 has channel `i` in the low and channel
            `i + channels / 2` in the high nibble. Codes of 3 bits are their upper two as such codes of 2 bits, behind
            them their lowest as such codes of 1 bit.
        affine: float16 `[..., 2]`, scale and zero side by side, so that one read fetches both; `[..., 1]`, the scale
            alone, for symmetric codes, whose zero is `-2**(bits - 1) * scale`; uint8 `[..., 1]`, the logarithm of the
            scale, for unbiased codes, whose zero is `(1 / 2 - 2**(bits - 1)) * scale`.
    """

    codes: torch.Tensor
    affine: torch.Tensor

    @property
    def scale(self) -> torch.Tensor:
        """As it is stored, `[...]`."""
        return self.affine[..., 0]

    @property
    def zero(self) -> torch.Tensor | None:
        """float16 `[...]`, or None for symmetric codes."""
        return self.affine[..., 1] if self.affine.shape[-1] == 2 else None

    def step(self, bits: int) -> torch.Tensor:
        """The scale, float32 `[...]`, for every kind of code."""
        return scales(bits, self.affine.device)[self.scale.int()] if self._by_byte else self.scale.float()

    def zero_point(self, bits: int) -> torch.Tensor:
        """The zero, float32 `[...]`, for every kind of code."""
        if self.zero is not None:
            return self.zero.float()
        return self.step(bits) * ((0.5 if self._by_byte else 0.0) - 2.0 ** (bits - 1))

    @property
    def _by_byte(self) -> bool:
        return self.affine.dtype == torch.uint8


def unit(bits: int) -> float:
    """The middle one of the scales that a byte stands for: near that of vectors whose channels have a variance of 1."""
    return 2.0 ** (7 / 8 * (2 - bits))


@keep(32)
def scales(bits: int, device: torch.device) -> torch.Tensor:
    """What each byte of a one-byte scale stands for: `unit(bits) * 2**((byte - ONE) / OCTAVE)`, float32 `[256]`."""
    exponents = (torch.arange(256, dtype=torch.float64) - ONE) / OCTAVE + math.log2(unit(bits))
    return torch.exp2(exponents).float().to(device)


def divisor(bits: int) -> int:
    """What the number of channels is a multiple of, so that codes fill their bytes."""
    return 8 // math.gcd(bits, 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes below `2**bits`, `[..., channels]`, into bytes, `[..., channels * bits / 8]`."""
    if codes.shape[-1] % divisor(bits):
        raise ValueError(f"{bits}-bit codes need a head_dim divisible by {divisor(bits)}, got {codes.shape[-1]}")
    if bits == 3:
        return torch.cat((pack(codes >> 1, 2), pack(codes & 1, 1)), dim=-1)
    per_byte = 8 // bits
    first, *rest = codes.chunk(per_byte, dim=-1)
    packed = first.contiguous()
    for i, part in enumerate(rest, start=1):
        packed = packed | (part << (bits * i))
    return packed


def unpack(packed: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """The codes of `pack`: uint8 tensors of consecutive channels, as many in each as there are in a byte's place."""
    if bits == 8:
        return [packed]
    if bits == 3:
        upper, lowest = packed.split([packed.shape[-1] // 3 * 2, packed.shape[-1] // 3], dim=-1)
        halves = [half for part in unpack(upper, 2) for half in part.chunk(2, dim=-1)]
        return [half << 1 | bit for half, bit in zip(halves, unpack(lowest, 1), strict=True)]
    last = 8 // bits - 1
    mask = 2**bits - 1
    parts = [(packed >> (bits * i)) & mask if i else packed & mask for i in range(last)]
    return [*parts, packed >> (bits * last)]


def quantize(x: torch.Tensor, bits: int, symmetric: bool = False) -> Quantized:
    """Quantise each vector of the last dimension with its own scale and zero point.

    Asymmetric: `zero = min`, `scale = (max - min) / (2**bits - 1)`. Symmetric (the paper's abs-max, arXiv 2606.08635):
    `scale = max|x| / (2**(bits - 1) - 1)`. Both are rounded to float16 first and used in their stored form. Ties round
    to even. Vectors that are not finite, or whose zero or scale is beyond float16, are not represented: their scale or
    zero is the largest number of float16, by which `saturated` knows them.

    Args:
        x: float32 `[..., channels]`.
        bits: 1, 2, 3, 4 or 8; without a zero point 2 or more, since one level alone is left of two.
        symmetric: Without a zero point.
    """
    _check(bits)
    top = 2**bits - 1
    if symmetric and bits == 1:
        raise ValueError("symmetric codes have 2 bits or more, got 1")
    if symmetric:
        offset = 2 ** (bits - 1)
        most = x.abs().amax(-1)
        scale = (most / (offset - 1)).where(most < torch.inf, FLOAT16_MAX).clamp(max=FLOAT16_MAX).half()
        affine, lowest = scale.unsqueeze(-1), 1
        shifted = x
    else:
        low, high = x.aminmax(dim=-1)
        finite = high - low < torch.inf  # False for NaN too
        zero = low.where(finite, 0.0).clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
        scale = ((high - low) / top).where(finite, FLOAT16_MAX).clamp(max=FLOAT16_MAX).half()
        affine, offset, lowest = torch.stack((scale, zero), dim=-1), 0, 0
        shifted = x - zero.float().unsqueeze(-1)
    inverse = torch.where(scale > 0, scale.float().reciprocal(), 0.0).unsqueeze(-1)
    codes = ((shifted * inverse).round() + offset).clamp(lowest, top).to(torch.uint8)
    return Quantized(pack(codes, bits), affine)


def quantize_unbiased(x: torch.Tensor, bits: int) -> Quantized:
    """Quantise each vector of the last dimension to odd multiples of half a step, whose scale takes one byte.

    The code `c` stands for `(c + 1/2 - 2**(bits - 1)) * scale`. Up to 4 bits the step of coding is near that of least
    squared error, `STEPS`, which shrinks vectors, and with the keys the logits of just those tokens that matter. So the
    scale that is stored makes up for it: `|x|**2 / <x, l>`, `l` being the levels `c + 1/2 - 2**(bits - 1)`, so that the
    product with `x` is right. The squared error is then `|x|**2 (|x|**2 |l|**2 / <x, l>**2 - 1)`, by which the step is
    chosen. At 8 bits it is the least of the scales there are by which no channel is clipped.

    Vectors that are not finite, or whose scale is beyond the largest one, are not represented: their byte is
    `SATURATED`. A vector of zeros comes back as 1/2 of the smallest scale.

    Args:
        x: float32 `[..., channels]`, in a unit in which the variance of channels is near 1.
        bits: 1, 2, 3, 4 or 8.
    """
    _check(bits)
    middle, table = 2 ** (bits - 1), scales(bits, x.device)
    if bits == 8:
        exponent = ((x.abs().amax(-1) / (middle - 0.5)).log2() - math.log2(unit(bits))) * OCTAVE + ONE
        byte = _byte(exponent.ceil())
        codes = _codes(x, table[byte.int()], middle)
    else:
        square = x.square().sum(-1)
        step = STEPS[bits] * (square / x.shape[-1]).sqrt()
        codes = torch.full_like(x, middle, dtype=torch.uint8)
        along, best = torch.zeros_like(step), torch.zeros_like(step)
        for multiple in TRIED:
            tried = _codes(x, step * multiple, middle)
            levels = tried.float() + (0.5 - middle)
            product = (x * levels).sum(-1)
            gain = product.square() / levels.square().sum(-1)
            better = gain > best
            codes = tried.where(better.unsqueeze(-1), codes)
            along, best = product.where(better, along), gain.where(better, best)
        scale = torch.where(square > 0, square / along, 0.0).where(square.isfinite(), torch.nan)
        byte = _byte((scale.log2() - math.log2(unit(bits))) * OCTAVE + ONE)
    return Quantized(pack(codes, bits), byte.unsqueeze(-1))


def _check(bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"codes of {', '.join(map(str, WIDTHS[:-1]))} or {WIDTHS[-1]} bits can be packed, got {bits}")


def _byte(exponent: torch.Tensor) -> torch.Tensor:
    """A scale's byte, of its logarithm; what is too small takes the smallest scale, what is not finite none."""
    byte = exponent.round().clamp(min=0)
    return byte.where(byte < SATURATED, float(SATURATED)).to(torch.uint8)  # NaN compares false


def _codes(x: torch.Tensor, step: torch.Tensor, middle: int) -> torch.Tensor:
    inverse = torch.where(step > 0, step.reciprocal(), 0.0).unsqueeze(-1)
    return ((x * inverse).floor() + middle).nan_to_num(nan=0.0).clamp(0, 2 * middle - 1).to(torch.uint8)


def saturated(quantized: Quantized) -> torch.Tensor:
    """Which vectors `quantize` or `quantize_unbiased` could not represent, bool `[...]`."""
    if quantized.affine.dtype == torch.uint8:
        return quantized.affine[..., 0] == SATURATED
    return (quantized.affine.abs() >= FLOAT16_MAX).any(-1)


def sound(states: torch.Tensor) -> torch.Tensor:
    """Which vectors float16 holds, bool `[...]` of `[..., dim]`."""
    return states.abs().amax(-1).float() <= FLOAT16_MAX  # NaN compares false; bfloat16 would round the bound


def any_saturated(quantized: Quantized) -> torch.Tensor:
    """Whether some vector is one of `saturated`, bool `[]`: no more than one pass over scales and zeros."""
    if quantized.affine.dtype == torch.uint8:
        return quantized.affine.amax() == SATURATED
    return quantized.affine.abs().amax() >= FLOAT16_MAX


def dequantize(quantized: Quantized, bits: int) -> torch.Tensor:
    """`codes * scale + zero` in float32, `[..., channels]`."""
    codes = torch.cat(unpack(quantized.codes, bits), dim=-1)
    return codes.float() * quantized.step(bits).unsqueeze(-1) + quantized.zero_point(bits).unsqueeze(-1)
