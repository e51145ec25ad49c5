"""Codecs: how keys and values of a token become integer codes, and back."""

from dataclasses import dataclass

import torch

from spectrumkv_kernels.hadamard import hadamard
from spectrumkv_kernels.quantize import Quantized, dequantize, quantize
from spectrumkv_kernels.rotary import Rotary


@dataclass(frozen=True)
class Codec:
    """What is done to a vector before it is rounded.

    Attributes:
        name: As users select it.
        center: Subtract `R(t) mean` from keys, the mean being taken in the frame before RoPE.
        hadamard: Rotate keys and values by the orthonormal Hadamard matrix.
        symmetric: Round without a zero point.
    """

    name: str
    center: bool
    hadamard: bool
    symmetric: bool


CODECS = {
    codec.name: codec
    for codec in (
        Codec("spectrum", center=True, hadamard=True, symmetric=False),
        Codec("absmax", center=False, hadamard=False, symmetric=True),  # the paper's
    )
}


def key_mean(
    keys: torch.Tensor, positions: torch.Tensor, rotary: Rotary, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """`mean_t R(-t) k_t`, float32 `[batch, kv_heads, head_dim]`.

    Args:
        keys: `[batch, kv_heads, tokens, head_dim]`, after RoPE.
        positions: integers `[tokens]`.
        rotary: The rotation of the model.
        weights: `[batch, tokens]`, 0 for tokens to leave out. A row without any weight has the mean 0.
    """
    flat = rotary.rotate(keys.float(), positions, inverse=True)
    if weights is None:
        return flat.mean(-2)
    weights = weights.float()[:, None, :, None]
    total = weights.sum(-2)
    return (flat * weights).sum(-2) / total.where(total > 0, 1.0)


def encode(
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    bits: int,
    codec: Codec,
    mean: torch.Tensor | None,
    rotary: Rotary,
) -> tuple[Quantized, Quantized]:
    """Quantise keys and values of the tokens of one tier.

    Args:
        keys: `[batch, kv_heads, tokens, head_dim]`, after RoPE.
        values: `[batch, kv_heads, tokens, value_dim]`.
        positions: int32 `[batch, kv_heads, tokens]`; slots of the tokens.
        bits: Width of a code, 2, 4 or 8.
        codec: What to do before rounding.
        mean: `key_mean` of the layer, float32 `[batch, kv_heads, head_dim]`; None where the codec does not centre.
        rotary: The rotation that `mean` was taken with.
    """
    k, v = keys.float(), values.float()
    if mean is not None:
        k = k - rotary.rotate(mean.unsqueeze(-2), positions)
    if codec.hadamard:
        k, v = hadamard(k), hadamard(v)
    return quantize(k, bits, codec.symmetric), quantize(v, bits, codec.symmetric)


def decode(
    keys: Quantized,
    values: Quantized,
    positions: torch.Tensor,
    bits: int,
    codec: Codec,
    mean: torch.Tensor | None,
    rotary: Rotary,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The float32 keys and values that `encode` stored, `[batch, kv_heads, tokens, dim]`. Arguments as there."""
    k, v = dequantize(keys, bits), dequantize(values, bits)
    if codec.hadamard:
        k, v = hadamard(k), hadamard(v)
    if mean is not None:
        k = k + rotary.rotate(mean.unsqueeze(-2), positions)
    return k, v
