"""The frame of a layer: what keys and values are brought into before they are rounded."""

from typing import NamedTuple

import torch

from ..rotation.rotary import Rotary

CREDIT = 4
"""Tokens with the mean power of all channels that are added to those there are, so that few tell little."""
FLOOR = 1e-4
"""Least power of a channel, in the mean of all."""
FITTED = 4096
"""Tokens, at equal distances, by which a frame is fitted at most."""


class Frame(NamedTuple):
    """The parts of a frame, float32. What is coded is `(k - R(t) mean) / key_scale`, `(v - value_mean) / value_scale`.

    Attributes:
        mean: Of keys before RoPE, `[batch, kv_heads, head_dim]`.
        key_scale: Of each channel, likewise.
        value_mean: `[batch, kv_heads, value_dim]`.
        value_scale: `[batch, kv_heads, 1]`.
    """

    mean: torch.Tensor
    key_scale: torch.Tensor
    value_mean: torch.Tensor
    value_scale: torch.Tensor


def frame_size(balanced: bool, key_dim: int, value_dim: int) -> int:
    """Numbers of a frame, for a row and KV head: only the mean where the codec does not balance."""
    return 2 * key_dim + value_dim + 1 if balanced else key_dim


def split_frame(frame: torch.Tensor, key_dim: int) -> Frame:
    """The parts, as views, of the frame of a codec that balances, `[batch, kv_heads, frame_size]`."""
    return Frame(*frame.split([key_dim, key_dim, frame.shape[-1] - 2 * key_dim - 1, 1], dim=-1))


def fit_frame(
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    rotary: Rotary,
    mean: torch.Tensor,
    weights: torch.Tensor | None = None,
    query_power: torch.Tensor | None = None,
) -> torch.Tensor:
    """The frame in which rounding these tokens does least harm, float32 `[batch, kv_heads, frame_size]`.

    A logit's error is the sum over channels `c` of `q_c` times the error of key channel `c`. After the Hadamard matrix
    all channels have the same error, in units of the power of all scaled channels: with scales `1 / b_c` it is
    `sum(E[q_c^2] / b_c^2) * sum(b_c^2 Var[k_c])` on the mean, which is least at `b_c = (E[q_c^2] / Var[k_c])^(1/4)`
    (the inequality of Cauchy and Schwarz). Both channels of a RoPE pair share a value, as positions turn one into the
    other. A common factor gives what is coded a power near 1.

    Each token counts by the shape of its vector, not by its length, and lengths by their logarithms: a few tokens that
    are a thousand times as large as others leave the scales as they were.

    Args:
        keys: `[batch, kv_heads, tokens, head_dim]`, after RoPE.
        values: `[batch, kv_heads, tokens, value_dim]`.
        positions: integers `[tokens]`.
        rotary: The rotation of the model.
        mean: `key_mean` of the tokens, float32 `[batch, kv_heads, head_dim]`.
        weights: `[batch or 1, tokens]`, 0 for tokens to leave out, whatever is in them. A row without any has the mean
            0 and the scale 1.
        query_power: `E[q^2]` of the queries that will read, `[batch, kv_heads, head_dim]`, in any unit; None: of
            channels alike.
    """
    every = -(-keys.shape[2] // FITTED)
    keys, values, positions = keys[:, :, ::every], values[:, :, ::every], positions[::every]
    counted = keys.new_ones(1, keys.shape[2], dtype=torch.float32) if weights is None else weights[:, ::every].float()
    counted = counted[:, None, :, None]
    total = counted.sum(2)
    share = counted / total.where(total > 0, 1.0).unsqueeze(2)

    left_out = counted == 0
    residual = (keys.float() - rotary.rotate(mean.unsqueeze(-2), positions)).square().masked_fill(left_out, 0.0)
    size = residual.mean(-1, keepdim=True)
    power = rotary.paired((residual / size.where(size > 0, 1.0) * share).sum(2))
    whole = power.mean(-1, keepdim=True)
    steady = ((total * power + CREDIT * whole) / (total + CREDIT)).clamp(min=FLOOR * whole)
    wanted = torch.ones_like(power) if query_power is None else rotary.paired(query_power.float())
    mostly = wanted.mean(-1, keepdim=True)
    wanted = wanted.clamp(min=FLOOR * mostly).where((mostly > 0) & mostly.isfinite(), 1.0)
    balance = (wanted / steady).pow(0.25).where(whole > 0, 1.0)
    key_scale = _usual((residual * balance.square().unsqueeze(2)).mean(-1, keepdim=True), share) / balance

    values = values.float().masked_fill(left_out, 0.0)
    value_mean = (values * share).sum(2)
    spread = (values - value_mean.unsqueeze(2)).square().mean(-1, keepdim=True)
    return torch.cat((mean, key_scale, value_mean, _usual(spread, share)), dim=-1)


def _usual(power: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The root of the tokens' geometric mean power, `[batch, kv_heads, 1]`, of `[batch, kv_heads, tokens, 1]`; 1 where
    there is none."""
    share = share * (power > 0)
    total = share.sum(2)
    mean = (power.clamp(min=torch.finfo(power.dtype).tiny).log2() * share).sum(2) / total.where(total > 0, 1.0)
    return torch.exp2(mean / 2).where(total > 0, 1.0)
