"""Triton twin of `codec.partition`."""

# mypy: allow-untyped-defs

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..backend.launch_triton import cdiv, launch, on_device
from . import partition as twin

BLOCK = 1024
"""Tokens that a program looks at at a time."""
TIERS = 7
"""Most tiers."""


@triton.jit(do_not_specialize=["tokens", "total", "end0", "end1", "end2", "end3", "end4", "end5"])
def rank_kernel(ranked, tiers, tokens, total, end0, end1, end2, end3, end4, end5, BLOCK: tl.constexpr):
    """The tier of each token, uint8 `[rows, tokens]`, by its place in `ranked`, and at which ranks tiers end."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    row = place // tokens * tokens
    rank = place - row
    tier = (rank >= end0).to(tl.uint8) + (rank >= end1).to(tl.uint8) + (rank >= end2).to(tl.uint8)
    tier += (rank >= end3).to(tl.uint8) + (rank >= end4).to(tl.uint8) + (rank >= end5).to(tl.uint8)
    token = tl.load(ranked + place, mask=inside, other=0)
    tl.store(tiers + row + token, tier, mask=inside)


@triton.jit(do_not_specialize=["tokens", "start", "end0", "end1", "end2", "end3", "end4", "end5"])
def order_kernel(tiers, order, tokens, start, end0, end1, end2, end3, end4, end5, BLOCK: tl.constexpr):
    """Positions of each tier's tokens behind those of the tiers before it, `[rows, tokens]`. Grid: rows, tiers."""
    row = tl.program_id(0).to(tl.int64)
    tiers += row * tokens
    order += row * tokens
    mine = tl.program_id(1)
    ends = (end0, end1, end2, end3, end4, end5)
    found = 0
    for tier in tl.static_range(len(ends)):
        found = tl.where(mine == tier + 1, ends[tier], found)
    for first in range(0, tokens, BLOCK):
        token = first + tl.arange(0, BLOCK)
        ours = (tl.load(tiers + token, mask=token < tokens, other=255) == mine).to(tl.int32)
        tl.store(order + found + tl.cumsum(ours, 0) - 1, start + token, mask=ours != 0)
        found += tl.sum(ours, 0)


def partition(score: torch.Tensor, counts: Sequence[int], start: int = 0) -> torch.Tensor:
    """As `codec.partition.partition`."""
    batch, heads, tokens = score.shape
    if len(counts) > TIERS or not score.numel():
        return twin.partition(score, counts, start)
    ranked = torch.argsort(score, dim=-1, descending=True, stable=True)
    tiers = torch.empty(batch, heads, tokens, dtype=torch.uint8, device=score.device)
    order = torch.empty(batch, heads, tokens, dtype=torch.int32, device=score.device)
    ends = [*itertools.accumulate(counts), *[tokens] * (TIERS - len(counts))]
    numbers = {f"end{i}": ends[i] for i in range(TIERS - 1)}
    with on_device(score):
        launch(
            rank_kernel,
            (cdiv(score.numel(), BLOCK),),
            {"ranked": ranked, "tiers": tiers},
            {"tokens": tokens, "total": score.numel(), **numbers},
            {"BLOCK": BLOCK},
        )
        launch(
            order_kernel,
            (batch * heads, len(counts)),
            {"tiers": tiers, "order": order},
            {"tokens": tokens, "start": start, **numbers},
            {"BLOCK": BLOCK},
        )
    return order
