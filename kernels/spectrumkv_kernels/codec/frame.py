"""The frame of a layer: what keys and values are brought into before they are rounded."""

from typing import NamedTuple

import torch

from ..rotation.rotary import Rotary
from .quantize import sound

CREDIT = 4
"""Tokens with the mean power of all channels that are added to those there are, so that few tell little."""
FLOOR = 1e-4
"""Least power of a channel, in the mean of all."""
FITTED = 4096
"""Tokens, at equal distances, by whose powers a frame is fitted at most; means are those of all."""
MEASURED = 1024
"""Queries by whose power keys are balanced at most."""


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


def key_mean(
    keys: torch.Tensor, positions: torch.Tensor, rotary: Rotary, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """`mean_t R(-t) k_t`, float32 `[batch, kv_heads, head_dim]`.

    Args:
        keys: `[batch, kv_heads, tokens, head_dim]`, after RoPE.
        positions: integers `[tokens]`.
        rotary: The rotation of the model.
        weights: `[batch or 1, kv_heads or 1, tokens]`, 0 for tokens to leave out, whatever is in them. Heads without
            any weight have the mean 0.
    """
    flat = rotary.rotate(keys.float(), positions, inverse=True)
    if weights is None:
        return flat.mean(-2)
    weights = weights.float().unsqueeze(-1)
    total = weights.sum(-2)
    return (flat * weights).masked_fill(weights == 0, 0.0).sum(-2) / total.where(total > 0, 1.0)


def fitted_by(
    keys: torch.Tensor, values: torch.Tensor | None, start: int, least: int, pads: torch.Tensor | None = None
) -> torch.Tensor:
    """By which tokens a frame is fitted, bool `[batch, kv_heads, tokens]`; arguments as in `fit_frame`."""
    index = torch.arange(start, start + keys.shape[2], device=keys.device)
    counted = ((index if pads is None else index - pads[:, None, None]) >= least) & sound(keys)
    return counted if values is None else counted & sound(values)


def query_power(query: torch.Tensor, kv_heads: int, pads: torch.Tensor | None = None) -> torch.Tensor:
    """`E[q^2]` of each channel over the queries of each KV head, in the unit of a row, as a sum of parts.

    Args:
        query: `[batch, heads, queries, dim]`, of which `MEASURED` at most are taken, at equal distances.
        kv_heads: How many there are.
        pads: Queries at the start of each row that are padding, `[batch]`; None: there are none.

    Returns:
        float32 `[batch, kv_heads, parts, dim]`.
    """
    every = -(-query.shape[2] // MEASURED)
    power = query[:, :, ::every].float().square()
    if pads is not None:
        real = torch.arange(0, query.shape[2], every, device=query.device) >= pads[:, None]
        power = power.masked_fill(~real[:, None, :, None], 0.0)
    return power.sum(2).unflatten(1, (kv_heads, -1)).sum(2, keepdim=True)


def fit_frame(
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    rotary: Rotary,
    balanced: bool,
    least: int = 0,
    pads: torch.Tensor | None = None,
    query_power: torch.Tensor | None = None,
) -> torch.Tensor:
    """The frame in which rounding these tokens does least harm, float32 `[batch, kv_heads, frame_size]`.

    Each head's is fitted by its tokens that float16 holds: one that is not finite would spoil all others.

    Args:
        keys: `[batch, kv_heads, tokens, head_dim]`, after RoPE.
        values: `[batch, kv_heads, tokens, value_dim]`.
        start: Position of the first token.
        rotary: The rotation of the model.
        balanced: The codec balances; otherwise the frame is the mean of keys.
        least: Tokens at the start of each row that are left out.
        pads: Positions at the start of each row that are padding, `[batch]`; None: there are none.
        query_power: Of the queries that will read, as `query_power` gives it, in any unit; None: of channels alike.
    """
    positions = torch.arange(start, start + keys.shape[2], device=keys.device)
    counted = fitted_by(keys, values if balanced else None, start, least, pads)
    mean = key_mean(keys, positions, rotary, counted)
    return balanced_frame(keys, values, positions, rotary, mean, counted, query_power) if balanced else mean


def balanced_frame(
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    rotary: Rotary,
    mean: torch.Tensor,
    counted: torch.Tensor,
    query_power: torch.Tensor | None = None,
) -> torch.Tensor:
    """`fit_frame` where the codec balances.

    A logit's error is the sum over channels `c` of `q_c` times the error of key channel `c`. After the Hadamard matrix
    all channels have the same error, in units of the power of all scaled channels: with scales `1 / b_c` it is
    `sum(E[q_c^2] / b_c^2) * sum(b_c^2 Var[k_c])` on the mean, which is least at `b_c = (E[q_c^2] / Var[k_c])^(1/4)`
    (the inequality of Cauchy and Schwarz). Both channels of a RoPE pair share a value, as positions turn one into the
    other. A common factor gives what is coded a power near 1.

    Each token counts by the shape of its vector, not by its length, and lengths by their logarithms: a few tokens that
    are a thousand times as large as others leave the scales as they were.

    Args:
        keys, values, rotary, query_power: As in `fit_frame`.
        positions: integers `[tokens]`.
        mean: `key_mean` of the tokens, float32 `[batch, kv_heads, head_dim]`.
        counted: Which tokens count, bool `[batch, kv_heads, tokens]`. A head without any has the mean 0 and the scale
            1.
    """
    counted = counted.unsqueeze(-1)
    values = values.float().masked_fill(~counted, 0.0)
    value_mean = values.sum(2) / counted.sum(2).clamp(min=1)

    every = -(-keys.shape[2] // FITTED)
    keys, values, counted = keys[:, :, ::every], values[:, :, ::every], counted[:, :, ::every]
    positions = positions[::every]
    total = counted.sum(2).float()
    share = counted / total.where(total > 0, 1.0).unsqueeze(2)
    residual = (keys.float() - rotary.rotate(mean.unsqueeze(-2), positions)).square().masked_fill(~counted, 0.0)
    size = residual.mean(-1, keepdim=True)
    power = rotary.paired((residual / size.where(size > 0, 1.0) * share).sum(2))
    whole = power.mean(-1, keepdim=True)
    steady = ((total * power + CREDIT * whole) / (total + CREDIT)).clamp(min=FLOOR * whole)
    wanted = torch.ones_like(power) if query_power is None else rotary.paired(query_power.float().sum(2))
    mostly = wanted.mean(-1, keepdim=True)
    wanted = wanted.clamp(min=FLOOR * mostly).where((mostly > 0) & mostly.isfinite(), 1.0)
    balance = (wanted / steady).pow(0.25).where(whole > 0, 1.0)
    key_scale = _usual((residual * balance.square().unsqueeze(2)).mean(-1, keepdim=True), share) / balance
    spread = (values - value_mean.unsqueeze(2)).square().mean(-1, keepdim=True)
    return torch.cat((mean, key_scale, value_mean, _usual(spread, share)), dim=-1)


def _usual(power: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The root of the tokens' geometric mean power, `[batch, kv_heads, 1]`, of `[batch, kv_heads, tokens, 1]`; 1 where
    there is none."""
    share = share * (power > 0)
    total = share.sum(2)
    mean = (power.clamp(min=torch.finfo(power.dtype).tiny).log2() * share).sum(2) / total.where(total > 0, 1.0)
    return torch.exp2(mean / 2).where(total > 0, 1.0)
