"""Whether the affine pairs of codes are sound. See `Quantized.affine`."""

import math
from collections.abc import Sequence

import torch

SOUND, NOT_FINITE, NEGATIVE = range(3)
"""What `affine_flaws` gives for a tensor: nothing is wrong, NaN or infinity, a scale below 0."""
MINUS_ZERO = 0x8000
"""Bits of a float16; above them are those of numbers below 0."""


def affine_flaws(affines: Sequence[torch.Tensor]) -> list[int]:
    """What is wrong with each of some tensors, the first of the above that applies.

    Args:
        affines: float16 `[..., 2]`, scale and zero, or `[..., 1]`, the scale; contiguous, all on one device, which is
            asked for all of them together.
    """
    extremes = [extreme for t in affines for extreme in (t.aminmax() if t.numel() else t.new_zeros(2))]
    scales = [_scale_bits(t).amax() if t.numel() else t.new_zeros((), dtype=torch.int32) for t in affines]
    if not affines:
        return []
    numbers = torch.stack(extremes).tolist()  # NaN where there is one
    return [
        NOT_FINITE if not (least > -math.inf and most < math.inf) else NEGATIVE if bits > MINUS_ZERO else SOUND
        for least, most, bits in zip(numbers[::2], numbers[1::2], torch.stack(scales).tolist(), strict=True)
    ]


def _scale_bits(affine: torch.Tensor) -> torch.Tensor:
    """Bits of the scales, int32 `[...]`."""
    if affine.shape[-1] == 1:
        return affine.view(torch.int16).int() & 0xFFFF
    # A scale is the lower half of a word, which may lie on another alignment.
    return (affine.clone() if affine.data_ptr() % 4 else affine).view(torch.int32) & 0xFFFF
