"""Round-to-nearest quantisation per token and head, and the packed layout of its codes."""

from typing import NamedTuple

import torch

FLOAT16_MAX = torch.finfo(torch.float16).max


class Quantized(NamedTuple):
    """Vectors stored as packed integer codes: `x ~ codes * scale + zero`.

    Attributes:
        codes: uint8 `[..., channels * bits / 8]`. With `w = channels * bits / 8`, byte `i` holds channels
            `i, i + w, i + 2w, ...` from its lowest bits up, so INT4 has channel `i` in the low and channel
            `i + channels / 2` in the high nibble.
        affine: float16 `[..., 2]`, scale and zero side by side, so that one read fetches both; `[..., 1]`, the scale
            alone, for symmetric codes, whose zero is `-2**(bits - 1) * scale`.
    """

    codes: torch.Tensor
    affine: torch.Tensor

    @property
    def scale(self) -> torch.Tensor:
        """float16 `[...]`."""
        return self.affine[..., 0]

    @property
    def zero(self) -> torch.Tensor | None:
        """float16 `[...]`, or None for symmetric codes."""
        return self.affine[..., 1] if self.affine.shape[-1] == 2 else None

    def zero_point(self, bits: int) -> torch.Tensor:
        """The zero, `[...]`, for either kind of code."""
        return self.scale.float() * -(2.0 ** (bits - 1)) if self.zero is None else self.zero


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes below `2**bits`, `[..., channels]`, into bytes, `[..., channels * bits / 8]`."""
    per_byte = 8 // bits
    if codes.shape[-1] % per_byte:
        raise ValueError(f"{bits}-bit codes need a head_dim divisible by {per_byte}, got {codes.shape[-1]}")
    first, *rest = codes.chunk(per_byte, dim=-1)
    packed = first.contiguous()
    for i, part in enumerate(rest, start=1):
        packed = packed | (part << (bits * i))
    return packed


def unpack(packed: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """The codes of `pack`: `8 / bits` uint8 tensors of consecutive channels, `[..., channels * bits / 8]` each."""
    if bits == 8:
        return [packed]
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
        bits: 2, 4 or 8.
        symmetric: Without a zero point.
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"codes of 2, 4 or 8 bits can be packed, got {bits}")
    top = 2**bits - 1
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


def saturated(quantized: Quantized) -> torch.Tensor:
    """Which vectors `quantize` could not represent, bool `[...]`."""
    return (quantized.affine.abs() >= FLOAT16_MAX).any(-1)


def dequantize(quantized: Quantized, bits: int) -> torch.Tensor:
    """`codes * scale + zero` in float32, `[..., channels]`."""
    codes = torch.cat(unpack(quantized.codes, bits), dim=-1)
    return codes.float() * quantized.scale.float().unsqueeze(-1) + quantized.zero_point(bits).float().unsqueeze(-1)
