"""Triton twins of `codec.partition`."""

# mypy: allow-untyped-defs

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..backend.launch_triton import cdiv, launch, on_device, strides_of
from ..segment import contiguous_rows
from . import partition as twin
from .triton_codec import DTYPES, widths_of
from .triton_quantize import sound

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


@triton.jit(do_not_specialize=["tokens", "start", "least"])
def weights_kernel(
    keys, values, pads, weights, tokens, start, least, heads,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of tokens x batch."""
    blocks = tl.cdiv(tokens, TOKENS)
    token = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    inside = token < tokens
    index = start + token
    if pads is not None:
        index -= tl.load(pads + batch).to(tl.int32)
    counted = inside & (index >= least)
    keys += batch * key_batch
    values += batch * value_batch
    at = token.to(tl.int64)
    for head in range(heads):
        counted = sound(keys + head * key_head + at * key_token, counted, KEY_DIM, KEY_WIDTH)
        if VALUE_DIM:
            counted = sound(values + head * value_head + at * value_token, counted, VALUE_DIM, VALUE_WIDTH)
    tl.store(weights + batch * tokens + token, counted.to(tl.float32), mask=inside)


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


def fitting_weights(
    keys: torch.Tensor, values: torch.Tensor | None, start: int, least: int, pads: torch.Tensor | None = None
) -> torch.Tensor:
    """As `codec.partition.fitting_weights`."""
    batch, heads, tokens, _ = keys.shape
    sides = (keys,) if values is None else (keys, values)
    if any(side.dtype not in DTYPES or not side.numel() for side in sides):
        return twin.fitting_weights(keys, values, start, least, pads)
    keys = contiguous_rows(keys)
    values = keys if values is None else contiguous_rows(values)
    sizes = widths_of(keys.shape[-1], values.shape[-1])
    if len(sides) == 1:
        sizes["VALUE_DIM"] = 0
    weights = torch.empty(batch, tokens, device=keys.device)
    numbers = {"tokens": tokens, "start": start, "least": least, "heads": heads}
    numbers |= {**strides_of("key", keys.stride()[:3]), **strides_of("value", values.stride()[:3])}
    tensors = {"keys": keys, "values": values, "pads": pads, "weights": weights}
    with on_device(keys):
        launch(weights_kernel, (cdiv(tokens, sizes["TOKENS"]) * batch,), tensors, numbers, sizes)
    return weights
