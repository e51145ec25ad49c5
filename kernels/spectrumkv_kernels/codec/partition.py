"""Which tokens go to which tier."""

from collections.abc import Sequence

import torch


def partition(score: torch.Tensor, counts: Sequence[int], start: int = 0, leading: int = 0) -> torch.Tensor:
    """Positions of the tokens, grouped by tier: the first tier takes those of the highest score, of equal ones the
    earlier.

    Args:
        score: `[batch, kv_heads, tokens]`; NaN counts as 0.
        counts: How many tokens each tier takes; all tokens in all.
        start: Position of the first token.
        leading: Tokens at the start that come before all others, whatever their score.

    Returns:
        int32 `[batch, kv_heads, tokens]`, ascending in each tier.
    """
    ranked = ranking(score, leading)
    parts = [part.sort(-1).values for part in ranked.split(list(counts), dim=-1)]
    return (torch.cat(parts, dim=-1) + start).to(torch.int32)


def ranking(score: torch.Tensor, leading: int) -> torch.Tensor:
    """The tokens by descending score, int64 `[batch, kv_heads, tokens]`; arguments as in `partition`."""
    score = score.masked_fill(score.isnan(), 0.0)
    score[..., :leading] = torch.inf
    return torch.argsort(score, dim=-1, descending=True, stable=True)
