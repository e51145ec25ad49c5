"""Decoding with a layer of fixed capacity: adding a token, which moves others into their tiers, and attention."""

import torch

from ..codec.quantize import Quantized
from ..codec.reference import take
from ..operations import encode, fit_frame, tiered_attention
from ..segment import Segment
from .layout import BASE, BLOCK, LENGTH, REFUSED, Layout, Views, slots


def prepare(buffer: torch.Tensor, layout: Layout) -> bool:
    """Make what the operations keep between calls, which must not first come about while a graph is captured.

    Args:
        buffer: As in `append`; not read.
        layout: Of it.

    Returns:
        Whether `append` and `attend` can be captured: nothing in them waits for the device.
    """
    return False


def append(buffer: torch.Tensor, state: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layout: Layout) -> None:
    """Tier the block that is due, if one is, and add a token.

    Tokens of a block rank by `layout.score`, sinks first and padding last, and fill the arenas from the most precise on
    by the numbers in `Views.own`; padding fills what `Views.totals` says beyond them. What no code stands for, because
    something in it is not finite or beyond the scales of float16, is stored by the nearest code there is.

    Args:
        buffer: uint8 `[layout.size]`, changed.
        state: int32 `[STATE]`, changed: `LENGTH` grows by one, or where the layer is full `REFUSED` does.
        keys: `[batch, kv_heads, 1, head_dim]`.
        values: `[batch, kv_heads, 1, value_dim]`.
        layout: Of the buffer.
    """
    length, base = int(state[LENGTH]), int(state[BASE])
    if length >= layout.capacity:
        state[REFUSED] += 1
        return
    views = layout.views(buffer)
    done = layout.done(length, base)
    if layout.due(length, base) > done:
        _tier(views, layout, done, base, length)
    slot = (length - base) % layout.ring
    views.keys[:, :, slot] = keys[:, :, 0]
    views.values[:, :, slot] = values[:, :, 0]
    state[LENGTH] += 1


def attend(
    query: torch.Tensor,
    buffer: torch.Tensor,
    state: torch.Tensor,
    layout: Layout,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the query of the token that was added last; NaN once a token was refused.

    Args:
        query: `[batch, heads, 1, head_dim]`.
        buffer, state, layout: As in `append`.
        scale, window, softcap, sinks: As in `tiered_attention`.
        mask: `[batch or 1, heads or 1, 1, columns]`, bool or added to the scores; a column for each position from 0 on
            that a layer of this capacity can hold, or for as many as it holds now. None: all tokens are seen.

    Returns:
        `[batch, heads, 1, value_dim]`.
    """
    length, base = int(state[LENGTH]), int(state[BASE])
    if int(state[REFUSED]):
        return query.new_full((*query.shape[:3], layout.value_dim), torch.nan)
    views = layout.views(buffer)
    blocks = layout.done(length, base)
    start = max(base + BLOCK * blocks, length - layout.ring)
    segments = []
    for arena, count in zip(views.arenas, views.totals[blocks].tolist(), strict=True):
        if count:
            segments.append(Segment(arena.bits, _first(arena.keys, count), _first(arena.values, count),
                                    arena.positions[:, :, :count]))  # fmt: skip
    at = start
    for place, count in slots(layout, base, start, length):
        positions = torch.arange(at, at + count, dtype=torch.int32, device=query.device)
        positions = positions.expand(layout.batch, layout.kv_heads, -1)
        keys, values = (t[:, :, place : place + count] for t in (views.keys, views.values))
        segments.append(Segment(16, keys, values, positions))
        at += count
    if mask is not None:
        mask = mask[..., :length]
    return tiered_attention(
        query,
        segments,
        length=length,
        scale=scale,
        codec=layout.codec,
        frame=views.frame if layout.codec.center and layout.tiers else None,
        rotary=layout.rotary,
        mask=mask,
        window=window,
        softcap=softcap,
        sinks=sinks,
        ragged=layout.ragged,
    )


def _first(stored: torch.Tensor | Quantized, count: int) -> torch.Tensor | Quantized:
    """The first tokens of an arena."""
    if isinstance(stored, Quantized):
        return Quantized(*(t[:, :, :count] for t in stored))
    return stored[:, :, :count]


def _tier(views: Views, layout: Layout, block: int, base: int, length: int) -> None:
    """Move a block, by its number, from the tail of a layer of `length` tokens into the arenas."""
    start = base + BLOCK * block
    positions = torch.arange(start, length, device=views.keys.device)
    place = (positions - base) % layout.ring
    keys, values = views.keys[:, :, place], views.values[:, :, place]
    index = positions - views.pads[:, None]  # of each token in its row; below 0 for padding
    if layout.codec.center:
        _settle_frame(views, layout, keys, values, positions, start)
    keys, values, positions, index = (t[..., :BLOCK] for t in (keys.mT, values.mT, positions, index))
    keys, values = keys.mT, values.mT

    score = values.float().norm(dim=-1) / keys.float().norm(dim=-1).clamp(min=1e-6)
    if layout.score == "recency":
        score = positions.float().expand_as(score)
    if layout.decay:
        score = score * torch.exp(-layout.decay * (length - positions))
    score = score.nan_to_num(nan=0.0)
    score = score.masked_fill((index < layout.sinks)[:, None], torch.finfo(score.dtype).max)
    score = score.masked_fill((index < 0)[:, None], -torch.inf)
    first, sizes = views.totals[block], views.totals[block + 1] - views.totals[block]
    tiers = _tiers(score, index >= 0, views.own[block], sizes)

    frame = views.frame if layout.codec.center else None
    for i, arena in enumerate(views.arenas):
        begin, count = int(first[i]), int(sizes[i])
        if not count:
            continue
        there = slice(begin, begin + count)
        chosen = (tiers == i).nonzero()[:, 2].view(layout.batch, layout.kv_heads, count)  # ascending
        at = (chosen + start).to(torch.int32)
        arena.positions[:, :, there] = at
        if isinstance(arena.keys, torch.Tensor) and isinstance(arena.values, torch.Tensor):
            arena.keys[:, :, there], arena.values[:, :, there] = take(keys, chosen), take(values, chosen)
            continue
        coded = encode(keys, values, at, arena.bits, layout.codec, frame, layout.rotary, start)
        for own, new in zip((arena.keys, arena.values), coded, strict=True):
            for stored, fresh in zip(own, new, strict=True):
                stored[:, :, there] = fresh


def _settle_frame(
    views: Views,
    layout: Layout,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    start: int,
) -> None:
    """Fix the frame of rows of which nothing was tiered yet, from their tokens in the tail but the sinks and padding.

    Channels of queries are taken to be alike.
    """
    rows = views.pads >= start
    if not bool(rows.any()):
        return
    least = layout.sinks if positions.numel() > layout.sinks else 0
    frame = fit_frame(keys, values, start, layout.rotary, layout.codec.balanced, least, views.pads)
    views.frame.copy_(torch.where(rows[:, None, None], frame, views.frame))


def _tiers(score: torch.Tensor, real: torch.Tensor, own: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """The arena of each token of a block, int64 `[batch, kv_heads, BLOCK]`; the number of arenas where it has none.

    Args:
        score: float32 `[batch, kv_heads, BLOCK]`, padding lowest.
        real: bool `[batch, BLOCK]`: no padding.
        own: int32 `[batch or 1, arenas]`: how many of a row's tokens go into each.
        sizes: int32 `[arenas]`: how many each takes.
    """
    tokens = torch.arange(BLOCK, device=score.device).expand_as(score).contiguous()

    def ranks(values: torch.Tensor, descending: bool) -> torch.Tensor:
        order = torch.argsort(values, dim=-1, descending=descending, stable=True)
        return torch.empty_like(order).scatter_(-1, order, tokens)

    def by(rank: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        edges = counts.cumsum(-1).view(-1, 1, counts.shape[-1]).expand(*rank.shape[:2], -1).contiguous()
        return torch.searchsorted(edges, rank.to(edges.dtype), right=True)

    rank = ranks(score, descending=True)
    filler = rank - real.sum(-1)[:, None, None]
    tier = torch.where(real[:, None], by(rank, own), by(filler, (sizes - own).clamp(min=0)))
    # Where a row has its sinks among the others' middle, arenas may want more than a block has. The least precise then
    # gives some up; said by rank once more, so that positions stay in order within each.
    return by(ranks(tier, descending=False), sizes)
