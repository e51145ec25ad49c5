"""Which tokens go to which tier, and by which of them a frame is fitted."""

from collections.abc import Sequence

import torch

from .quantize import sound


def partition(score: torch.Tensor, counts: Sequence[int], start: int = 0) -> torch.Tensor:
    """Positions of the tokens, grouped by tier: the first tier takes those of the highest score, of equal ones the
    earlier.

    Args:
        score: `[batch, kv_heads, tokens]`, without NaN.
        counts: How many tokens each tier takes; all tokens in all.
        start: Position of the first token.

    Returns:
        int32 `[batch, kv_heads, tokens]`, ascending in each tier.
    """
    ranked = torch.argsort(score, dim=-1, descending=True, stable=True)
    parts = [part.sort(-1).values for part in ranked.split(list(counts), dim=-1)]
    return (torch.cat(parts, dim=-1) + start).to(torch.int32)


def fitting_weights(
    keys: torch.Tensor, values: torch.Tensor | None, start: int, least: int, pads: torch.Tensor | None = None
) -> torch.Tensor:
    """Weights of the tokens by which a frame is fitted, float32 `[batch, tokens]`: 1, or 0 for those left out.

    These are padding, the first tokens of each row, and those that are not `sound`.

    Args:
        keys: `[batch, kv_heads, tokens, head_dim]`.
        values: `[batch, kv_heads, tokens, value_dim]`, where they are fitted too.
        start: Position of the first token.
        least: Tokens at the start of each row that are left out.
        pads: Positions at the start of each row that are padding, `[batch]`; None: there are none.
    """
    index = torch.arange(start, start + keys.shape[2], device=keys.device)[None]
    counted = (index if pads is None else index - pads[:, None]) >= least
    for side in (keys,) if values is None else (keys, values):
        counted = counted & sound(side)
    return counted.float()
