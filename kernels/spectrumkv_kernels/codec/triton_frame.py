"""Triton twin of `codec.frame`: the frame of a layer in three passes over its tokens.

Each pass needs what the one before found in all tokens. The first says which tokens count and sums up keys and values;
of these follow the means. The second sums up the shapes of the keys' residuals, of which follows the balance of their
channels. The third sums up the logarithms of vectors' powers, and its last program writes the scales. Tokens are split
over programs, and every sum is taken in a fixed order.
"""

# mypy: allow-untyped-defs

import functools

import torch
import triton
import triton.language as tl

from ..backend.launch_triton import Launch, Launcher, Series, alignments, cdiv, next_power_of_2, on_device, strides_of
from ..rotation.rotary import Rotary
from ..rotation.triton_rotary import partner, turn, turns
from ..segment import contiguous_rows
from . import frame as twin
from .triton_codec import DTYPES, widths_of
from .triton_quantize import is_sound

SPAN = 64
"""Tokens, or queries, that one program sums up at least."""
SPLITS = 64
"""Most programs that share the tokens of a row and KV head."""
TILE = tl.constexpr(16)
"""Sums of programs that are added up at a time."""
CREDIT, FLOOR = tl.constexpr(twin.CREDIT), tl.constexpr(twin.FLOOR)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def balance_of(power, total, wanted, inside, DIM: tl.constexpr):
    """By what channels of keys are multiplied, `(wanted / power)**(1 / 4)` as in `fit_frame`: float32 `[channels]`.

    Args:
        power: Mean power of each channel in vectors of power 1, alike for the channels of a pair.
        total: Weight of all tokens.
        wanted: Power of the queries likewise, in any unit.
        inside: Which channels are real.
    """
    whole = tl.sum(power, 0) * (1 / DIM)
    steady = tl.maximum((power * total + whole * CREDIT) / (total + CREDIT), whole * FLOOR)
    mostly = tl.sum(tl.where(inside, wanted, 0.0), 0) * (1 / DIM)
    known = (mostly > 0) & (mostly < float("inf"))  # not so of NaN
    wanted = tl.where(known, tl.maximum(wanted, mostly * FLOOR), 1.0)
    return tl.where(whole > 0, tl.sqrt(tl.sqrt(wanted / tl.where(whole > 0, steady, 1.0))), 1.0)


@triton.jit
def logarithms(power, weight):
    """Weighted binary logarithms of vectors' powers, and the weights of those that have any, both `[tokens]`."""
    there = power > 0
    return tl.where(there, weight * tl.log2(tl.maximum(power, TINY)), 0.0), tl.where(there, weight, 0.0)


@triton.jit
def usual(logarithm, weight):
    """As `codec.frame._usual`, of the sums of `logarithms`."""
    return tl.where(weight > 0, tl.exp2(logarithm / tl.where(weight > 0, weight, 1.0) * 0.5), 1.0)


@triton.jit
def _turns_of(table, first, channels, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Cosine and sine at one position, `[1, channels]`."""
    return turn(table, tl.full([1], 0, tl.int32) + first, channels, PAIRS, INTERLEAVED)


@triton.jit
def _added(sums, count, stride, channels):
    """The sum of `count` vectors that lie `stride` apart, float32 `[channels]`."""
    total = tl.zeros([TILE, channels.shape[0]], tl.float32)
    for first in range(0, count, TILE):
        each = first + tl.arange(0, TILE)
        place = sums + each[:, None] * stride + channels[None, :]
        total += tl.load(place, mask=(each < count)[:, None], other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _added_numbers(sums, count, stride):
    """The sum of `count` numbers that lie `stride` apart."""
    total = tl.zeros([TILE], tl.float32)
    for first in range(0, count, TILE):
        each = first + tl.arange(0, TILE)
        total += tl.load(sums + each * stride, mask=each < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _areas(work, row, size, splits, fits, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr):
    """Where in the memory between the passes a row's sums of each pass lie, its ticket, and which tokens count.

    The first pass leaves for each split the sums of keys times cosine and keys times sine, of values, and how many
    tokens count; the second those of shapes, and how many; the third four numbers.
    """
    sums = work + row * size
    powers = sums + splits * (2 * KEY_WIDTH + VALUE_WIDTH + 1)
    logs = powers + fits * (KEY_WIDTH + 1)
    ticket = logs + fits * 4
    return sums, powers, logs, ticket.to(tl.pointer_type(tl.int32)), ticket + 1


@triton.jit
def _means(sums, splits, channels, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PAIRS: tl.constexpr,
           INTERLEAVED: tl.constexpr):  # fmt: skip
    """The mean of keys, and the same of each channel's partner, from the sums of the first pass."""
    SIZE: tl.constexpr = 2 * KEY_WIDTH + VALUE_WIDTH + 1
    count = _added_numbers(sums + 2 * KEY_WIDTH + VALUE_WIDTH, splits, SIZE)
    weight = tl.where(count > 0, count, 1.0)
    mean = _added(sums, splits, SIZE, channels)
    theirs = mean
    if PAIRS:
        other, sign = partner(channels, PAIRS, INTERLEAVED)
        turned = channels < 2 * PAIRS
        other = tl.where(turned, other, channels)
        sign = tl.where(turned, sign, 0.0)
        theirs = _added(sums, splits, SIZE, other) + sign * _added(sums + KEY_WIDTH, splits, SIZE, channels)
        mean -= sign * _added(sums + KEY_WIDTH, splits, SIZE, other)
    return mean / weight, theirs / weight


@triton.jit
def _residual(
    x, counted, mean, theirs, cos, sin, table, first, channels,
    DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Keys that begin at `x`, `[tokens, 1]`, less `R(t) mean`: float32 `[tokens, channels]`, 0 where none counts.

    Args:
        mean, theirs: As `_means` gives them.
        cos, sin: Of the positions' distances to the `first` one, `[tokens, channels]`.
    """
    y = tl.load(x + channels[None, :], mask=counted[:, None] & (channels < DIM)[None, :], other=0.0).to(tl.float32)
    shift = mean[None, :]
    if PAIRS:
        _, sign = partner(channels, PAIRS, INTERLEAVED)
        base_cos, base_sin = _turns_of(table, first, channels, PAIRS, INTERLEAVED)
        across = (theirs * sign)[None, :]
        # R(first + t) mean = R(t) (R(first) mean), and of the partner the same with the opposite sign.
        shift, across = shift * base_cos + across * base_sin, across * base_cos - shift * base_sin
        shift = shift * cos + across * sin
    return tl.where(counted[:, None], y - shift, 0.0)


@triton.jit(do_not_specialize=["tokens", "start", "least", "span", "size", "splits", "fits"])
def sums_kernel(
    keys, values, pads, table, work, tokens, start, least, span, size, splits, fits, heads,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The first pass, of which each program takes `span` tokens. Grid: splits x batch x heads.

    Args:
        values: None where only the mean of keys is asked for.
        start: Position of the first token.
        work: See `_areas`.
    """
    split, row = tl.program_id(0) % splits, (tl.program_id(0) // splits).to(tl.int64)
    batch, head = row // heads, row % heads
    sums, _, _, ticket, counts = _areas(work, row, size, splits, fits, KEY_WIDTH, VALUE_WIDTH)
    channels, value_channels = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    keys += batch * key_batch + head * key_head
    if values is not None:
        values += batch * value_batch + head * value_head
    if pads is not None:
        least += tl.load(pads + batch).to(tl.int32)
    along = tl.zeros([TOKENS, KEY_WIDTH], tl.float32)
    across = tl.zeros([TOKENS, KEY_WIDTH], tl.float32)
    value_sum = tl.zeros([TOKENS, VALUE_WIDTH], tl.float32)
    number = tl.zeros([TOKENS], tl.float32)
    if PAIRS:  # cosines and sines are looked up once: positions turn by the same angles from block to block
        cos, sin = turn(table, tl.arange(0, TOKENS), channels, PAIRS, INTERLEAVED)
    for i in range(0, span, TOKENS):
        first = split * span + i
        token = first + tl.arange(0, TOKENS)
        inside = token < tokens
        counted = inside & (start + token >= least)
        at = token.to(tl.int64)[:, None]
        there = counted[:, None] & (channels < KEY_DIM)[None, :]
        x = tl.load(keys + at * key_token + channels[None, :], mask=there, other=0.0).to(tl.float32)
        counted = counted & is_sound(x)
        if values is not None:
            there = counted[:, None] & (value_channels < VALUE_DIM)[None, :]
            v = tl.load(values + at * value_token + value_channels[None, :], mask=there, other=0.0).to(tl.float32)
            counted = counted & is_sound(v)
            value_sum += tl.where(counted[:, None], v, 0.0)
        x = tl.where(counted[:, None], x, 0.0)
        if PAIRS:
            base_cos, base_sin = _turns_of(table, start + first, channels, PAIRS, INTERLEAVED)
            along += x * (base_cos * cos - base_sin * sin)
            across += x * (base_sin * cos + base_cos * sin)
        else:
            along += x
        number += counted.to(tl.float32)
        tl.store(counts + token, counted.to(tl.float32), mask=inside)
    sums += split * (2 * KEY_WIDTH + VALUE_WIDTH + 1)
    tl.store(sums + channels, tl.sum(along, 0))
    tl.store(sums + KEY_WIDTH + channels, tl.sum(across, 0))
    tl.store(sums + 2 * KEY_WIDTH + value_channels, tl.sum(value_sum, 0))
    tl.store(sums + 2 * KEY_WIDTH + VALUE_WIDTH, tl.sum(number, 0))
    if split == 0:
        tl.store(ticket, 0)


@triton.jit(do_not_specialize=["size", "splits"])
def mean_kernel(
    work, frame, size, splits,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The mean of keys, where that is all of the frame. Grid: batch x heads."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, KEY_WIDTH)
    mean, _ = _means(work + row * size, splits, channels, KEY_WIDTH, VALUE_WIDTH, PAIRS, INTERLEAVED)
    tl.store(frame + row * KEY_DIM + channels, mean, mask=channels < KEY_DIM)


@triton.jit(do_not_specialize=["tokens", "start", "every", "span", "size", "splits", "fits"])
def power_kernel(
    keys, table, work, frame, tokens, start, every, span, size, splits, fits, heads, key_batch, key_head, key_token,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The second pass, over one of `every` tokens, of which each program takes `span`. It also stores the means in the
    frame. Grid: fits x batch x heads."""
    fit, row = tl.program_id(0) % fits, (tl.program_id(0) // fits).to(tl.int64)
    batch, head = row // heads, row % heads
    sums, powers, _, _, counts = _areas(work, row, size, splits, fits, KEY_WIDTH, VALUE_WIDTH)
    channels = tl.arange(0, KEY_WIDTH)
    mean, theirs = _means(sums, splits, channels, KEY_WIDTH, VALUE_WIDTH, PAIRS, INTERLEAVED)
    if fit == 0:
        value_channels = tl.arange(0, VALUE_WIDTH)
        SIZE: tl.constexpr = 2 * KEY_WIDTH + VALUE_WIDTH + 1
        count = _added_numbers(sums + 2 * KEY_WIDTH + VALUE_WIDTH, splits, SIZE)
        value_mean = _added(sums + 2 * KEY_WIDTH, splits, SIZE, value_channels) / tl.where(count > 0, count, 1.0)
        frame += row * (2 * KEY_DIM + VALUE_DIM + 1)
        tl.store(frame + channels, mean, mask=channels < KEY_DIM)
        tl.store(frame + 2 * KEY_DIM + value_channels, value_mean, mask=value_channels < VALUE_DIM)
    keys += batch * key_batch + head * key_head
    power = tl.zeros([TOKENS, KEY_WIDTH], tl.float32)
    number = tl.zeros([TOKENS], tl.float32)
    cos, sin = 0.0, 0.0
    if PAIRS:
        cos, sin = turn(table, tl.arange(0, TOKENS) * every, channels, PAIRS, INTERLEAVED)
    for i in range(0, span, TOKENS):
        first = fit * span + i
        token = (first + tl.arange(0, TOKENS)) * every
        counted = tl.load(counts + token, mask=token < tokens, other=0.0) > 0
        y = _residual(
            keys + token.to(tl.int64)[:, None] * key_token, counted, mean, theirs, cos, sin, table,
            start + first * every, channels, KEY_DIM, PAIRS, INTERLEAVED,
        )  # fmt: skip
        y *= y
        length = tl.sum(y, 1) * (1 / KEY_DIM)
        power += y / tl.where(length > 0, length, 1.0)[:, None]
        number += counted.to(tl.float32)
    powers += fit * (KEY_WIDTH + 1)
    tl.store(powers + channels, tl.sum(power, 0))
    tl.store(powers + KEY_WIDTH, tl.sum(number, 0))


@triton.jit(do_not_specialize=["tokens", "start", "every", "span", "size", "splits", "fits", "parts"])
def size_kernel(
    keys, values, table, work, frame, query_power, tokens, start, every, span, size, splits, fits, parts, heads,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The third pass, over the tokens of the second. The last program of a row and head stores the scales in the frame.
    Grid: fits x batch x heads.

    Args:
        query_power: As `frame.query_power` gives it, in `parts` parts, or None.
    """
    fit, row = tl.program_id(0) % fits, (tl.program_id(0) // fits).to(tl.int64)
    batch, head = row // heads, row % heads
    _, powers, logs, ticket, counts = _areas(work, row, size, splits, fits, KEY_WIDTH, VALUE_WIDTH)
    channels, value_channels = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    inside, value_inside = channels < KEY_DIM, value_channels < VALUE_DIM
    other = channels
    if PAIRS:
        other, _ = partner(channels, PAIRS, INTERLEAVED)
        other = tl.where(channels < 2 * PAIRS, other, channels)

    power = _added(powers, fits, KEY_WIDTH + 1, channels) + _added(powers, fits, KEY_WIDTH + 1, other)
    total = _added_numbers(powers + KEY_WIDTH, fits, KEY_WIDTH + 1)
    wanted = tl.where(inside, 1.0, 0.0)
    if query_power is not None:
        query_power += row * parts * KEY_DIM
        last = KEY_DIM - 1  # read where there is no channel
        wanted = _added(query_power, parts, KEY_DIM, tl.minimum(channels, last))
        wanted += _added(query_power, parts, KEY_DIM, tl.minimum(other, last))
    power *= 0.5 / tl.where(total > 0, total, 1.0)
    balance = balance_of(power, total, wanted, inside, KEY_DIM)

    frame += row * (2 * KEY_DIM + VALUE_DIM + 1)
    mean = tl.load(frame + channels, mask=inside, other=0.0)
    theirs = tl.load(frame + other, mask=inside, other=0.0)
    value_mean = tl.load(frame + 2 * KEY_DIM + value_channels, mask=value_inside, other=0.0)
    keys += batch * key_batch + head * key_head
    values += batch * value_batch + head * value_head
    key_sum = tl.zeros([TOKENS], tl.float32)
    key_weight = tl.zeros([TOKENS], tl.float32)
    value_sum = tl.zeros([TOKENS], tl.float32)
    value_weight = tl.zeros([TOKENS], tl.float32)
    cos, sin = 0.0, 0.0
    if PAIRS:
        cos, sin = turn(table, tl.arange(0, TOKENS) * every, channels, PAIRS, INTERLEAVED)
    for i in range(0, span, TOKENS):
        first = fit * span + i
        token = (first + tl.arange(0, TOKENS)) * every
        weight = tl.load(counts + token, mask=token < tokens, other=0.0)
        counted = weight > 0
        at = token.to(tl.int64)[:, None]
        y = balance[None, :] * _residual(
            keys + at * key_token, counted, mean, theirs, cos, sin, table, start + first * every, channels,
            KEY_DIM, PAIRS, INTERLEAVED,
        )  # fmt: skip
        found, number = logarithms(tl.sum(y * y, 1) * (1 / KEY_DIM), weight)
        key_sum += found
        key_weight += number
        there = counted[:, None] & value_inside[None, :]
        v = tl.load(values + at * value_token + value_channels[None, :], mask=there, other=0.0).to(tl.float32)
        v = tl.where(there, v - value_mean[None, :], 0.0)
        found, number = logarithms(tl.sum(v * v, 1) * (1 / VALUE_DIM), weight)
        value_sum += found
        value_weight += number
    mine = logs + fit * 4
    tl.store(mine, tl.sum(key_sum, 0))
    tl.store(mine + 1, tl.sum(key_weight, 0))
    tl.store(mine + 2, tl.sum(value_sum, 0))
    tl.store(mine + 3, tl.sum(value_weight, 0))
    tl.debug_barrier()  # one thread takes the ticket: all others must have stored by then
    if tl.atomic_add(ticket, 1) == fits - 1:
        scale = usual(_added_numbers(logs, fits, 4), _added_numbers(logs + 1, fits, 4))
        tl.store(frame + KEY_DIM + channels, scale / balance, mask=inside)
        scale = usual(_added_numbers(logs + 2, fits, 4), _added_numbers(logs + 3, fits, 4))
        tl.store(frame + 2 * KEY_DIM + VALUE_DIM, scale)


@triton.jit(do_not_specialize=["queries", "every", "span", "parts"])
def query_kernel(
    query, pads, out, queries, every, span, parts, kv_heads, query_batch, query_head, query_token,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Sums of squares of one of `every` queries, of which each program takes `span` of all heads of a group. Grid:
    parts x batch x KV heads."""
    part, row = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64)
    batch, head = row // kv_heads, row % kv_heads
    query += batch * query_batch + head * GROUP * query_head
    least = 0
    if pads is not None:
        least = tl.load(pads + batch).to(tl.int32)
    channels = tl.arange(0, WIDTH)
    power = tl.zeros([TOKENS, WIDTH], tl.float32)
    for i in range(0, span, TOKENS):
        token = (part * span + i + tl.arange(0, TOKENS)) * every
        there = ((token >= least) & (token < queries))[:, None] & (channels < DIM)[None, :]
        place = query + token.to(tl.int64)[:, None] * query_token + channels[None, :]
        for each in range(GROUP):
            x = tl.load(place + each * query_head, mask=there, other=0.0).to(tl.float32)
            power += x * x
    tl.store(out + (row * parts + part) * DIM + channels, tl.sum(power, 0), mask=channels < DIM)


def _shares(tokens: int, block: int) -> tuple[int, int]:
    """By how many programs these tokens are shared, and how many one takes, a multiple of `block`."""
    span = cdiv(cdiv(tokens, min(cdiv(tokens, SPAN), SPLITS)), block) * block
    return cdiv(tokens, span), span


@functools.lru_cache(maxsize=64)
def _passes(
    shape: tuple[int, ...],
    value_dim: int,
    strides: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    start: int,
    rotary: Rotary,
    balanced: bool,
    least: int,
    padded: torch.dtype | None,
    parts: int,
) -> tuple[Series, int]:
    """The launches of `fit_frame`, and how much memory they need between them, in numbers for a row and KV head."""
    batch, heads, tokens, key_dim = shape
    sizes = widths_of(key_dim, value_dim, 2048)
    sizes["TOKENS"] = min(sizes["TOKENS"], SPAN)
    if not balanced:
        sizes |= {"VALUE_DIM": 0, "VALUE_WIDTH": 1}
    modes = {**sizes, "PAIRS": len(rotary.inv_freq), "INTERLEAVED": rotary.interleaved}
    splits, span = _shares(tokens, sizes["TOKENS"])
    every = cdiv(tokens, twin.FITTED)
    fits, fitted = _shares(cdiv(tokens, every), sizes["TOKENS"]) if balanced else (0, 0)
    key_width, value_width = sizes["KEY_WIDTH"], sizes["VALUE_WIDTH"]
    size = splits * (2 * key_width + value_width + 1) + fits * (key_width + 5) + 1 + tokens
    rows = batch * heads
    of_keys, of_values = strides_of("key", strides[:3]), strides_of("value", strides[3:])
    numbers = {
        "tokens": tokens, "start": start, "least": least, "span": span, "size": size,
        "splits": splits, "fits": fits, "heads": heads, **of_keys, **of_values,
    }  # fmt: skip
    launches: list[Launch] = [
        (Launcher(sums_kernel, modes), (splits * rows, 1, 1), ("keys", "values", "pads", "table", "work"), numbers)
    ]
    if not balanced:
        names = ("KEY_DIM", "KEY_WIDTH", "VALUE_WIDTH", "PAIRS", "INTERLEAVED")
        mean = Launcher(mean_kernel, {name: modes[name] for name in names})
        launches.append((mean, (rows, 1, 1), ("work", "frame"), {"size": size, "splits": splits}))
        return Series(launches), size
    numbers = {
        "tokens": tokens, "start": start, "every": every, "span": fitted, "size": size, "splits": splits, "fits": fits
    }  # fmt: skip
    grid, more = (fits * rows, 1, 1), {"heads": heads, **of_keys}
    power, log = Launcher(power_kernel, modes), Launcher(size_kernel, modes)
    launches.append((power, grid, ("keys", "table", "work", "frame"), numbers | more))
    more = {"parts": parts, **more, **of_values}
    launches.append((log, grid, ("keys", "values", "table", "work", "frame", "query_power"), numbers | more))
    return Series(launches), size


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
    """As `codec.frame.fit_frame`."""
    shape, value_dim = keys.shape, values.shape[-1]
    known = keys.dtype in DTYPES and values.dtype in DTYPES and 2 * len(rotary.inv_freq) <= shape[3]
    if not known or not keys.numel() or not values.numel():
        return twin.fit_frame(keys, values, start, rotary, balanced, least, pads, query_power)
    keys, values = contiguous_rows(keys), contiguous_rows(values)
    query_power = query_power.float().contiguous() if balanced and query_power is not None else None
    series, size = _passes(
        tuple(shape), value_dim, (*keys.stride()[:3], *values.stride()[:3]), (keys.dtype, values.dtype), start, rotary,
        balanced, least, None if pads is None else pads.dtype, 0 if query_power is None else query_power.shape[2],
    )  # fmt: skip
    device, rows = keys.device, shape[0] * shape[1]
    table = turns(rotary, device) if rotary.inv_freq else None
    work = torch.empty(rows, size, device=device)
    frame = torch.empty(*shape[:2], twin.frame_size(balanced, shape[3], value_dim), device=device)
    tensors = keys, values if balanced else None, pads, table, work, frame, query_power
    passes: list[tuple[torch.Tensor | None, ...]] = [tensors[:5]]
    if balanced:
        passes += (keys, table, work, frame), (keys, values, table, work, frame, query_power)
    else:
        passes.append((work, frame))
    with on_device(keys):
        series(passes, alignments(tensors))
    return frame


@functools.lru_cache(maxsize=64)
def _queries(
    shape: tuple[int, ...], kv_heads: int, strides: tuple[int, ...], dtype: torch.dtype, padded: torch.dtype | None
) -> tuple[Series, int]:
    """The launch of `query_power`, and in how many parts it sums."""
    batch, heads, queries, dim = shape
    width, every = next_power_of_2(dim), cdiv(queries, twin.MEASURED)
    block = min(max(1, 4096 // width), SPAN)
    parts, span = _shares(cdiv(queries, every), block)
    numbers = {"queries": queries, "every": every, "span": span, "parts": parts, "kv_heads": kv_heads}
    numbers |= strides_of("query", strides)
    modes = {"GROUP": heads // kv_heads, "DIM": dim, "WIDTH": width, "TOKENS": block}
    launcher, grid = Launcher(query_kernel, modes), (parts * batch * kv_heads, 1, 1)
    return Series([(launcher, grid, ("query", "pads", "out"), numbers)]), parts


def query_power(query: torch.Tensor, kv_heads: int, pads: torch.Tensor | None = None) -> torch.Tensor:
    """As `codec.frame.query_power`, in more parts."""
    if query.dtype not in DTYPES or not query.numel():
        return twin.query_power(query, kv_heads, pads)
    query = contiguous_rows(query)
    padded = None if pads is None else pads.dtype
    series, parts = _queries(tuple(query.shape), kv_heads, query.stride()[:3], query.dtype, padded)
    out = torch.empty(query.shape[0], kv_heads, parts, query.shape[3], device=query.device)
    with on_device(query):
        series([(query, pads, out)], alignments((query, pads, out)))
    return out
