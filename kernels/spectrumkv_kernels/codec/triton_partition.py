"""Triton twin of `codec.partition`."""

# mypy: allow-untyped-defs

import functools
import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..backend.launch_triton import Launch, Launcher, Series, alignments, cdiv, on_device
from . import partition as twin
from .triton_codec import DTYPES

BLOCK = 1024
"""Tokens that a program looks at at a time."""
MINE, OTHERS = 32, 128
"""Tokens that a program of `count_kernel` ranks, and with how many it compares them at a time."""
COUNTED = 4096
"""Up to so many tokens all are compared with all, which takes one launch; more are sorted."""
ENDS = [f"end{tier}" for tier in range(6)]
"""Most tiers, less one."""


@triton.jit
def _tier_at(rank, end0, end1, end2, end3, end4, end5):
    """The tier of a rank, uint8, where these are the ranks at which tiers end."""
    tier = (rank >= end0).to(tl.uint8) + (rank >= end1).to(tl.uint8) + (rank >= end2).to(tl.uint8)
    return tier + (rank >= end3).to(tl.uint8) + (rank >= end4).to(tl.uint8) + (rank >= end5).to(tl.uint8)


@triton.jit
def _scores(score, token, tokens, leading):
    """By which these tokens of a row rank; those that are not there rank last."""
    x = tl.load(score + token, mask=token < tokens, other=float("-inf")).to(tl.float32)
    return tl.where(token < leading, float("inf"), tl.where(x == x, x, 0.0))


@triton.jit(do_not_specialize=["tokens", "leading", *ENDS])
def count_kernel(
    score, tiers, tokens, leading, end0, end1, end2, end3, end4, end5, MINE: tl.constexpr, OTHERS: tl.constexpr
):  # fmt: skip
    """The tier of each token, uint8 `[rows, tokens]`, by how many come before it. Grid: blocks of tokens x rows."""
    blocks = tl.cdiv(tokens, MINE)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    score += row * tokens
    token = tl.program_id(0) % blocks * MINE + tl.arange(0, MINE)
    mine = _scores(score, token, tokens, leading)[:, None]
    before = tl.zeros([MINE, OTHERS], tl.int32)
    for first in range(0, tokens, OTHERS):
        other = first + tl.arange(0, OTHERS)
        theirs = _scores(score, other, tokens, leading)[None, :]
        earlier = (theirs == mine) & (other[None, :] < token[:, None])
        before += ((theirs > mine) | earlier).to(tl.int32)
    tier = _tier_at(tl.sum(before, 1), end0, end1, end2, end3, end4, end5)
    tl.store(tiers + row * tokens + token, tier, mask=token < tokens)


@triton.jit(do_not_specialize=["tokens", "total", *ENDS])
def rank_kernel(ranked, tiers, tokens, total, end0, end1, end2, end3, end4, end5, BLOCK: tl.constexpr):
    """The tier of each token, uint8 `[rows, tokens]`, by its place in `ranked`."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    row = place // tokens * tokens
    token = tl.load(ranked + place, mask=inside, other=0)
    tl.store(tiers + row + token, _tier_at(place - row, end0, end1, end2, end3, end4, end5), mask=inside)


@triton.jit(do_not_specialize=["tokens", "start", *ENDS])
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


@functools.lru_cache(maxsize=256)  # layers of a plan have their own counts
def _passes(
    rows: int, tokens: int, dtype: torch.dtype, counts: tuple[int, ...], start: int, leading: int
) -> tuple[Series, bool]:
    """The launches of `partition`, and whether they rank the tokens or expect them ranked."""
    given = [*itertools.accumulate(counts), *[tokens] * (len(ENDS) + 1 - len(counts))]
    ends, counted = dict(zip(ENDS, given, strict=False)), tokens <= COUNTED
    ranks: Launch
    if counted:
        launcher, grid = Launcher(count_kernel, {"MINE": MINE, "OTHERS": OTHERS}), (cdiv(tokens, MINE) * rows, 1, 1)
        ranks = launcher, grid, ("score", "tiers"), {"tokens": tokens, "leading": leading, **ends}
    else:
        launcher, grid = Launcher(rank_kernel, {"BLOCK": BLOCK}), (cdiv(rows * tokens, BLOCK), 1, 1)
        ranks = launcher, grid, ("ranked", "tiers"), {"tokens": tokens, "total": rows * tokens, **ends}
    numbers = {"tokens": tokens, "start": start, **ends}
    order = Launcher(order_kernel, {"BLOCK": BLOCK}), (rows, len(counts), 1), ("tiers", "order"), numbers
    return Series([ranks, order]), counted


def partition(score: torch.Tensor, counts: Sequence[int], start: int = 0, leading: int = 0) -> torch.Tensor:
    """As `codec.partition.partition`."""
    batch, heads, tokens = shape = score.shape
    if len(counts) > len(ENDS) + 1 or score.dtype not in DTYPES or not score.numel():
        return twin.partition(score, counts, start, leading)
    series, counted = _passes(batch * heads, tokens, score.dtype, tuple(counts), start, leading)
    ranks = score.contiguous() if counted else twin.ranking(score, leading)
    tiers = torch.empty(shape, dtype=torch.uint8, device=score.device)
    order = torch.empty(shape, dtype=torch.int32, device=score.device)
    with on_device(score):
        series([(ranks, tiers), (tiers, order)], alignments((ranks, tiers, order)))
    return order
