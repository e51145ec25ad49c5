"""The rotation R(t) inside Triton kernels."""

import torch
import triton
import triton.language as tl

from .rotary import Rotary

FINE = tl.constexpr(2048)
"""Positions that share a coarse angle. The table has as many coarse angles: it covers 4 million positions."""


def turns(rotary: Rotary, device: torch.device) -> torch.Tensor:
    """The table that `turn` reads: one for all lengths, so that its address and size never change."""
    return rotary.steps(FINE.value, FINE.value**2, device)


@triton.jit
def partner(channels, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The other channel of each one's pair, and the sign of its sine in `R(t)`."""
    if INTERLEAVED:
        first = channels % 2 == 0
        other = channels ^ 1
    else:
        first = channels < PAIRS
        other = tl.where(first, channels + PAIRS, channels - PAIRS)
    return other, tl.where(first, -1.0, 1.0)


@triton.jit
def turn(table, positions, channels, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Cosine and sine of each channel's angle, `[positions, channels]`, from the table of `turns`."""
    pair = channels // 2 if INTERLEAVED else channels % PAIRS
    turned = (channels < 2 * PAIRS)[None, :]
    t = tl.maximum(positions, 0)
    fine = table + (t % FINE)[:, None] * (2 * PAIRS) + pair[None, :]
    coarse = table + (tl.minimum(t // FINE, FINE - 1) + FINE)[:, None] * (2 * PAIRS) + pair[None, :]
    cos_fine = tl.load(fine, mask=turned, other=1.0)
    sin_fine = tl.load(fine + PAIRS, mask=turned, other=0.0)
    cos_coarse = tl.load(coarse, mask=turned, other=1.0)
    sin_coarse = tl.load(coarse + PAIRS, mask=turned, other=0.0)
    return cos_coarse * cos_fine - sin_coarse * sin_fine, sin_coarse * cos_fine + cos_coarse * sin_fine


@triton.jit
def rotated_mean(mean, table, positions, channels, DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """`R(t) mean`, `[positions, channels]`."""
    shift = tl.load(mean + channels, mask=channels < DIM, other=0.0)[None, :]
    if PAIRS:
        cos, sin = turn(table, positions, channels, PAIRS, INTERLEAVED)
        other, sign = partner(channels, PAIRS, INTERLEAVED)
        across = tl.load(mean + other, mask=channels < 2 * PAIRS, other=0.0) * sign
        shift = shift * cos + across[None, :] * sin
    return shift
