"""Orthonormal Walsh-Hadamard transform over the channels of a head."""

import torch

from ..backend.tensor_cache import keep


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Multiply the last dimension by the orthonormal Hadamard matrix, which is its own inverse.

    A size that is no power of two is transformed in blocks of its largest power-of-two factor (96 = 3 blocks of
    32). Written as butterflies, not as a matrix product, so that a row's result does not depend on how many rows are
    transformed with it: dequantised contents are then bit-equal before and after any cache operation.

    Args:
        x: `[..., channels]`, floating point.

    Returns:
        A new tensor of the shape and dtype of `x`.
    """
    given, channels = x.shape, x.shape[-1]
    block = channels & -channels  # the largest power of two that divides it
    x = x.reshape(-1, channels // block, block)
    y, other, half = x, torch.empty_like(x), 1
    while half < block:
        shape = (*x.shape[:2], block // (2 * half), 2, half)
        low, high = y.view(shape).unbind(-2)
        sums, differences = other.view(shape).unbind(-2)
        torch.add(low, high, out=sums)
        torch.sub(low, high, out=differences)
        y, other = other, torch.empty_like(x) if y is x else y
        half *= 2
    return (y * block**-0.5).view(given)


@keep(16)
def hadamard_matrix(channels: int, device: torch.device) -> torch.Tensor:
    """The matrix of `hadamard`, float32 `[channels, channels]`: one product where bit-equality does not matter."""
    return hadamard(torch.eye(channels)).to(device)
