"""Which tokens go to which tier."""

from collections.abc import Sequence

import torch


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
