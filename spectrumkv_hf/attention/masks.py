"""Masks of attention."""

import torch


def causal_mask(query: torch.Tensor, length: int) -> torch.Tensor:
    """bool `[1, 1, queries, length]` for the queries of the last tokens: True where one may attend."""
    queries = query.shape[2]
    return query.new_ones(1, 1, queries, length, dtype=torch.bool).tril(length - queries)
