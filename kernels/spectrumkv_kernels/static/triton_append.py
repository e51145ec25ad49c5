"""Triton twin of `static.reference.append`: one launch, which a CUDA graph can hold, with a program for each row and
KV head.

Each program reads how many tokens there are, tiers a block of its own if one is due, and writes its part of the new
token. The one that ends last counts the token.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..backend.launch_triton import Launcher, on_device, trait
from ..backend.tensor_cache import keep
from ..codec.quantize import WIDTHS, divisor
from ..codec.triton_codec import DTYPES, ELEMENTS
from ..codec.triton_encode import copy_rows, encode_rows, load_residual
from ..codec.triton_frame import balance_of, logarithms, usual
from ..codec.triton_quantize import sound
from ..rotation.triton_rotary import partner, turn, turns
from ..segment import contiguous_rows
from . import layout as static
from . import reference as twin
from .layout import ALIGNMENT, Layout

BLOCK = tl.constexpr(static.BLOCK)
LENGTH, TICKET = tl.constexpr(static.LENGTH), tl.constexpr(static.TICKET)
BASE, REFUSED = tl.constexpr(static.BASE), tl.constexpr(static.REFUSED)
HALF = tl.constexpr(ALIGNMENT // 2)
WIDEST = 1024
"""Channels of a head at most."""
OPTIONS = {"num_warps": 4, "num_stages": 1}
TYPES = dict(zip(DTYPES, (tl.float32, tl.bfloat16, tl.float16), strict=True))


@triton.jit
def _plain(odd):
    """The number that `_odd` made this of."""
    return (odd - 3) // 2


@triton.jit
def _tensor(buffer, odd, TYPE: tl.constexpr):
    """The tensor of a buffer that begins at the place `odd` stands for."""
    return (buffer + (odd.to(tl.int64) - 3) * HALF).to(tl.pointer_type(TYPE))


@triton.jit
def _norms(x, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Euclidean norms of the `BLOCK` tokens that begin at `x`."""
    STEP: tl.constexpr = WIDTH if WIDTH < 64 else 64
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, WIDTH, STEP):
        channels = first + tl.arange(0, STEP)
        y = tl.load(x[:, None] + channels[None, :], mask=(channels < DIM)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(y * y, 1)
    return tl.sqrt(total)


@triton.jit
def _tokens(
    ring_keys, ring_values, first, row, base, length, pad, ring, least,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, FITTED: tl.constexpr,
):  # fmt: skip
    """Tokens from position `first` on: their positions, their places in the tail of the row's head, and by which of
    them a frame is fitted, which are all but sinks, padding, and those that float16 does not hold."""
    at = first + tl.arange(0, TOKENS)
    place = row * ring + (at - base) % ring
    counted = sound(ring_keys + place * KEY_DIM, (at < length) & (at - pad >= least), KEY_DIM, KEY_WIDTH)
    if FITTED:
        counted = sound(ring_values + place * VALUE_DIM, counted, VALUE_DIM, VALUE_WIDTH)
    return at, place, counted


@triton.jit
def _settle_frame(
    ring_keys, ring_values, frame, table, row, base, start, length, pad, ring, sinks,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, TOKENS: tl.constexpr, FITTED: tl.constexpr,
):  # fmt: skip
    """Store the frame of a row, of which nothing was tiered yet, by its tokens from `start` on.

    The mean of `R(-t) k`, and where `FITTED` the other parts as `codec.frame.fit_frame` has them.
    """
    channels = tl.arange(0, KEY_WIDTH)
    inside = channels < KEY_DIM
    other, sign = partner(channels, PAIRS, INTERLEAVED) if PAIRS else (channels, channels)
    least = tl.where(length - start > sinks, sinks, 0)
    sums = tl.zeros([TOKENS, KEY_WIDTH], tl.float32)
    tokens = tl.zeros([TOKENS], tl.float32)
    for first in range(start, length, TOKENS):
        at, source, counted = _tokens(
            ring_keys, ring_values, first, row, base, length, pad, ring, least,
            KEY_DIM, KEY_WIDTH, VALUE_DIM, VALUE_WIDTH, TOKENS, FITTED,
        )  # fmt: skip
        x = ring_keys + (source * KEY_DIM)[:, None]
        y = tl.load(x + channels[None, :], mask=counted[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if PAIRS:
            turned = counted[:, None] & (channels < 2 * PAIRS)[None, :]
            z = tl.load(x + other[None, :], mask=turned, other=0.0).to(tl.float32)
            cos, sin = turn(table, at, channels, PAIRS, INTERLEAVED)
            y = y * cos - sign[None, :] * z * sin
        sums += y
        tokens += counted.to(tl.float32)
    total = tl.sum(tokens, 0)
    weight = tl.where(total > 0, total, 1.0)
    tl.store(frame + channels, tl.sum(sums, 0) / weight, mask=inside)
    if FITTED:
        tl.debug_barrier()  # other threads read the mean
        sums = tl.zeros([TOKENS, KEY_WIDTH], tl.float32)
        value_channels = tl.arange(0, VALUE_WIDTH)
        value_inside = value_channels < VALUE_DIM
        value_sums = tl.zeros([TOKENS, VALUE_WIDTH], tl.float32)
        for first in range(start, length, TOKENS):
            at, source, counted = _tokens(
                ring_keys, ring_values, first, row, base, length, pad, ring, least,
                KEY_DIM, KEY_WIDTH, VALUE_DIM, VALUE_WIDTH, TOKENS, FITTED,
            )  # fmt: skip
            x = ring_keys + (source * KEY_DIM)[:, None]
            y = load_residual(x, counted, at, frame, None, table, channels, KEY_DIM, PAIRS, INTERLEAVED, True)
            y = tl.where(counted[:, None], y * y, 0.0)
            size = tl.sum(y, 1) * (1 / KEY_DIM)
            sums += y / tl.where(size > 0, size, 1.0)[:, None]
            v = ring_values + (source * VALUE_DIM)[:, None] + value_channels[None, :]
            value_sums += tl.load(v, mask=counted[:, None] & value_inside[None, :], other=0.0).to(tl.float32)
        power = tl.sum(sums, 0) / weight
        key_scale = frame + KEY_DIM
        if PAIRS:  # the mean of both channels, by way of memory
            tl.store(key_scale + channels, power, mask=inside)
            tl.debug_barrier()
            turned = channels < 2 * PAIRS
            power = tl.where(turned, (power + tl.load(key_scale + other, mask=turned, other=0.0)) * 0.5, power)
            tl.debug_barrier()
        balance = balance_of(power, total, tl.where(inside, 1.0, 0.0), inside, KEY_DIM)
        mean = tl.sum(value_sums, 0) / weight
        key_sum = tl.zeros([TOKENS], tl.float32)
        key_weight = tl.zeros([TOKENS], tl.float32)
        value_sum = tl.zeros([TOKENS], tl.float32)
        value_weight = tl.zeros([TOKENS], tl.float32)
        for first in range(start, length, TOKENS):
            at, source, counted = _tokens(
                ring_keys, ring_values, first, row, base, length, pad, ring, least,
                KEY_DIM, KEY_WIDTH, VALUE_DIM, VALUE_WIDTH, TOKENS, FITTED,
            )  # fmt: skip
            x = ring_keys + (source * KEY_DIM)[:, None]
            y = load_residual(x, counted, at, frame, None, table, channels, KEY_DIM, PAIRS, INTERLEAVED, True)
            y *= balance[None, :]
            size = tl.sum(tl.where(counted[:, None], y * y, 0.0), 1) * (1 / KEY_DIM)
            found, number = logarithms(size, counted.to(tl.float32))
            key_sum += found
            key_weight += number
            v = ring_values + (source * VALUE_DIM)[:, None] + value_channels[None, :]
            there = counted[:, None] & value_inside[None, :]
            y = tl.load(v, mask=there, other=0.0).to(tl.float32) - mean[None, :]
            size = tl.sum(tl.where(there, y * y, 0.0), 1) * (1 / VALUE_DIM)
            found, number = logarithms(size, counted.to(tl.float32))
            value_sum += found
            value_weight += number
        key_usual = usual(tl.sum(key_sum, 0), tl.sum(key_weight, 0))
        tl.store(key_scale + channels, key_usual / balance, mask=inside)
        tl.store(key_scale + KEY_DIM + value_channels, mean, mask=value_inside)
        tl.store(key_scale + KEY_DIM + VALUE_DIM, usual(tl.sum(value_sum, 0), tl.sum(value_weight, 0)))


@triton.jit
def _scores(
    ring_keys, ring_values, row, base, start, length, pad, ring, sinks, decay,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    RECENCY: tl.constexpr, DECAYS: tl.constexpr,
):  # fmt: skip
    """By which the tokens of a block rank: float32 `[BLOCK]`, sinks highest and padding lowest."""
    at = start + tl.arange(0, BLOCK)
    if RECENCY:
        score = at.to(tl.float32)
    else:
        source = row * ring + (at - base) % ring
        norm = _norms(ring_keys + source * KEY_DIM, KEY_DIM, KEY_WIDTH)
        norm = tl.where(norm < 1e-6, 1e-6, norm)  # NaN stays
        score = _norms(ring_values + source * VALUE_DIM, VALUE_DIM, VALUE_WIDTH) / norm
    if DECAYS:
        score *= tl.exp(-decay * (length - at).to(tl.float32))
    score = tl.where(score == score, score, 0.0)
    MOST: tl.constexpr = 3.4028234663852886e38
    score = tl.minimum(tl.maximum(score, -MOST), MOST)
    score = tl.where(at - pad < sinks, MOST, score)
    return tl.where(at < pad, float("-inf"), score)


@triton.jit
def _rank(values, DESCENDING: tl.constexpr):
    """The rank of each among the values of a block, of those alike by their order."""
    token = tl.arange(0, BLOCK)
    mine, others = values[:, None], values[None, :]
    first = others > mine if DESCENDING else others < mine
    first = first | ((others == mine) & (token[None, :] < token[:, None]))
    return tl.sum(first.to(tl.int32), 1)


@triton.jit
def _tiers(score, real, own, totals, ROOMS: tl.constexpr):
    """The arena of each token of a block, `ROOMS` where it has none.

    Args:
        own: Where it is said how many of the row's tokens go into each arena.
        totals: Where it is said how many lie in each before the block; the numbers after it follow.
    """
    rank = _rank(score, True)
    filler = rank - tl.sum(real.to(tl.int32), 0)
    tier = tl.zeros([BLOCK], tl.int32)
    edge = 0
    spare = 0
    for i in tl.static_range(ROOMS):
        mine = tl.load(own + i)
        edge += mine
        spare += tl.maximum(tl.load(totals + ROOMS + i) - tl.load(totals + i) - mine, 0)
        tier += tl.where(real, rank >= edge, filler >= spare).to(tl.int32)
    rank = _rank(tier, False)  # once more, as in the twin
    tier = tl.zeros([BLOCK], tl.int32)
    edge = 0
    for i in tl.static_range(ROOMS):
        edge += tl.load(totals + ROOMS + i) - tl.load(totals + i)
        tier += (rank >= edge).to(tl.int32)
    return tier


@triton.jit
def _store(
    buffer, ring, mean, scale, table, stored, affine, source, positions, places, inside, bits,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, WIDTHS: tl.constexpr, HADAMARD: tl.constexpr,
    SYMMETRIC: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Store keys or values in an arena.

    Args:
        ring: The tail's.
        mean, scale: Of the frame, or None; see `encode_rows`.
        stored, affine: Where the arena's begin in the buffer, as `_odd`.
        source, places: Tokens' places in the tail and in the arena.
        inside: Which of them are stored.
        bits: Of the arena, one of `BITS`; of codes one of `WIDTHS`.
    """
    x = ring + source[:, None] * DIM
    if len(BITS) > len(WIDTHS):  # noqa: SIM102  # one condition is for the compiler, the other for the device
        if bits == 16:
            copy_rows(x, _tensor(buffer, stored, ring.dtype.element_ty), places, inside, DIM, WIDTH)
    if len(WIDTHS):  # noqa: SIM102
        if bits < 16:
            scales = _tensor(buffer, affine, tl.float16 if scale is None else tl.uint8)
            encode_rows(
                x, inside, positions, mean, scale, table, _tensor(buffer, stored, tl.uint8), scales,
                None if SYMMETRIC else scales + 1, places, bits,
                DIM, WIDTH, WIDTHS, HADAMARD, PAIRS, INTERLEAVED, EACH,
            )  # fmt: skip


@triton.jit
def _tier(
    buffer, table, places, tokens, row, heads, own_rows, block, base, length, ring, sinks, decay,
    TYPE: tl.constexpr, KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, TOKENS: tl.constexpr, BITS: tl.constexpr, WIDTHS: tl.constexpr, RECENCY: tl.constexpr,
    DECAYS: tl.constexpr, FRAME: tl.constexpr, HADAMARD: tl.constexpr, SYMMETRIC: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Move one head's tokens of a block, by its number, into the arenas."""
    ROOMS: tl.constexpr = len(BITS)
    start = base + BLOCK * block
    ring_keys = _tensor(buffer, places[0], TYPE)
    ring_values = _tensor(buffer, places[1], TYPE)
    totals = _tensor(buffer, places[2], tl.int32) + block * ROOMS
    batch = row // heads
    own = _tensor(buffer, places[3], tl.int32) + (block.to(tl.int64) * own_rows + batch % own_rows) * ROOMS
    pad = tl.load(_tensor(buffer, places[4], tl.int32) + batch)
    frame = _tensor(buffer, places[5], tl.float32) + row * FRAME
    FITTED: tl.constexpr = FRAME > KEY_DIM
    if FRAME:  # noqa: SIM102  # one condition is for the compiler, the other for the device
        if pad >= start:  # nothing of this row was tiered yet
            _settle_frame(
                ring_keys, ring_values, frame, table, row, base, start, length, pad, ring, sinks, KEY_DIM,
                KEY_WIDTH, VALUE_DIM, VALUE_WIDTH, PAIRS, INTERLEAVED, TOKENS // 2 if TOKENS > 1 else 1, FITTED,
            )  # fmt: skip
    score = _scores(
        ring_keys, ring_values, row, base, start, length, pad, ring, sinks, decay,
        KEY_DIM, KEY_WIDTH, VALUE_DIM, VALUE_WIDTH, RECENCY, DECAYS,
    )  # fmt: skip
    token = tl.arange(0, BLOCK)
    tier = _tiers(score, start + token >= pad, own, totals, ROOMS)
    alike = (tier[None, :] == tier[:, None]) & (token[None, :] < token[:, None])
    place = tl.sum(alike.to(tl.int32), 1)  # so that positions ascend
    for i in tl.static_range(ROOMS):
        there = row * _plain(tokens[i]) + tl.load(totals + i) + place
        tl.store(_tensor(buffer, places[10 + 5 * i], tl.int32) + there, start + token, mask=tier == i)
    tl.debug_barrier()  # other threads read the positions and the frame
    for arena in range(ROOMS):
        # All arenas run the same code: compiling it for each takes minutes.
        bits, room, at0, at1, at2, at3, at4 = BITS[0], tokens[0], places[6], places[7], places[8], places[9], places[10]
        for i in tl.static_range(1, ROOMS):
            bits = tl.where(arena == i, BITS[i], bits)
            room = tl.where(arena == i, tokens[i], room)
            at0 = tl.where(arena == i, places[6 + 5 * i], at0)
            at1 = tl.where(arena == i, places[7 + 5 * i], at1)
            at2 = tl.where(arena == i, places[8 + 5 * i], at2)
            at3 = tl.where(arena == i, places[9 + 5 * i], at3)
            at4 = tl.where(arena == i, places[10 + 5 * i], at4)
        begin = tl.load(totals + arena)
        count = tl.load(totals + ROOMS + arena) - begin
        origin = row * _plain(room) + begin
        positions = _tensor(buffer, at4, tl.int32)
        for first in range(0, count, TOKENS):
            nth = first + tl.arange(0, TOKENS)
            inside = nth < count
            at = tl.load(positions + origin + nth, mask=inside, other=0)
            source = row * ring + (at - base) % ring
            _store(
                buffer, ring_keys, frame if FRAME else None, frame + KEY_DIM if FITTED else None, table,
                at0, at1, source, at, origin + nth, inside, bits,
                KEY_DIM, KEY_WIDTH, BITS, WIDTHS, HADAMARD, SYMMETRIC, PAIRS, INTERLEAVED, True,
            )  # fmt: skip
            _store(
                buffer, ring_values, frame + 2 * KEY_DIM if FITTED else None,
                frame + (2 * KEY_DIM + VALUE_DIM) if FITTED else None, table,
                at2, at3, source, at, origin + nth, inside, bits,
                VALUE_DIM, VALUE_WIDTH, BITS, WIDTHS, HADAMARD, SYMMETRIC, 0, False, False,
            )  # fmt: skip


INTEGERS = [
    *("key_batch", "key_head", "value_batch", "value_head", "heads", "own_rows", "capacity", "ring", "recent"),
    "sinks",
]
"""Arguments for whose values nothing is compiled anew."""


@triton.jit(do_not_specialize=INTEGERS)
def append_kernel(
    buffer,
    state,
    keys,
    values,
    table,
    key_batch,
    key_head,
    value_batch,
    value_head,
    places,  # as `_odd`, in units of `ALIGNMENT`: of keys, values, totals, own, pads, frame; of each room five
    tokens,  # as `_odd`: that each room takes
    heads,
    own_rows,
    capacity,
    ring,
    recent,
    sinks,
    decay,
    TYPE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,  # that are coded at a time
    BITS: tl.constexpr,
    WIDTHS: tl.constexpr,  # those of codes among them
    RECENCY: tl.constexpr,
    DECAYS: tl.constexpr,
    FRAME: tl.constexpr,  # numbers of a row's frame
    HADAMARD: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Grid: batch x KV heads."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    length = tl.load(state + LENGTH)
    key_channels, value_channels = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    key_there, value_there = key_channels < KEY_DIM, value_channels < VALUE_DIM
    key = tl.load(keys + batch * key_batch + head * key_head + key_channels, mask=key_there)
    value = tl.load(values + batch * value_batch + head * value_head + value_channels, mask=value_there)
    if length < capacity:
        base = tl.load(state + BASE)
        if len(BITS):
            done = tl.maximum(length - base - recent - 2, 0) // BLOCK  # `Layout.done`, and `Layout.due`
            if tl.maximum(length - base - recent - 1, 0) // BLOCK > done:
                _tier(
                    buffer, table, places, tokens, row, heads, own_rows, done, base, length, ring, sinks, decay, TYPE,
                    KEY_DIM, KEY_WIDTH, VALUE_DIM, VALUE_WIDTH, TOKENS, BITS, WIDTHS, RECENCY, DECAYS,
                    FRAME, HADAMARD, SYMMETRIC, PAIRS, INTERLEAVED,
                )  # fmt: skip
        place = row * ring + (length - base) % ring
        tl.store(_tensor(buffer, places[0], TYPE) + place * KEY_DIM + key_channels, key.to(TYPE), mask=key_there)
        tl.store(
            _tensor(buffer, places[1], TYPE) + place * VALUE_DIM + value_channels, value.to(TYPE), mask=value_there
        )
    # One thread takes the ticket: all others must have read the state by then.
    tl.debug_barrier()
    if tl.atomic_add(state + TICKET, 1) == tl.num_programs(0) - 1:
        tl.store(state + TICKET, 0)
        if length < capacity:
            tl.store(state + LENGTH, length + 1)
        else:
            tl.store(state + REFUSED, tl.load(state + REFUSED) + 1)


def _odd(number: int) -> int:
    """A number as the kernel takes it in a tuple: never 1 nor divisible by 16, so that nothing is compiled anew."""
    return 2 * number + 3


class _Prepared(NamedTuple):
    """How tokens are added to buffers of one layout.

    Attributes:
        launcher: Of the kernel.
        grid: Of a launch.
        numbers: Those arguments that are the same at every launch.
        trait: What of them decides which code is compiled.
        table: Of the rotation; None where there is none.
    """

    launcher: Launcher
    grid: tuple[int, int, int]
    numbers: dict[str, Any]
    trait: Any
    table: torch.Tensor | None


def _fits(layout: Layout) -> bool:
    """Whether the kernel can do it; what it can't is the twin's."""
    dims = (layout.key_dim, layout.value_dim)
    if layout.dtype not in TYPES or max(dims) > WIDEST:
        return False
    if not layout.tiers:
        return True
    whole = all(bits == 16 or (bits in WIDTHS and not any(d % divisor(bits) for d in dims)) for bits, _ in layout.rooms)
    ranked = layout.score in ("kv_norm", "recency")
    # A new token must not take the place of one that is still to be read by another program.
    spare = layout.ring > layout.recent_window + static.BLOCK + 1
    return whole and ranked and spare and 2 * len(layout.rotary.inv_freq) <= layout.key_dim


@functools.lru_cache(maxsize=1024)
def _launcher(**constants: Any) -> Launcher:
    return Launcher(append_kernel, constants, **OPTIONS)


@keep(1024)
def prepared(layout: Layout, device: torch.device) -> _Prepared | None:
    """None where the kernel can't do it."""
    if not _fits(layout):
        return None
    first = {name: _odd(start // ALIGNMENT) for name, _, _, start in layout.places}
    parts = ("keys{}", "keys.affine", "values{}", "values.affine", "positions")
    places = [first[name] for name in ("keys", "values", "totals", "own", "pads", "frame")]
    for bits, _ in layout.rooms:
        kind = "" if bits == 16 else ".codes"
        places += [first.get(f"{bits}.{part.format(kind)}", _odd(0)) for part in parts]
    numbers = {
        "places": tuple(places),
        "tokens": tuple(_odd(room.tokens) for room in layout.rooms) or (_odd(0),),
        "heads": layout.kv_heads,
        "own_rows": layout.batch if layout.padded else 1,
        "capacity": layout.capacity,
        "ring": layout.ring,
        "recent": layout.recent_window,
        "sinks": layout.sinks,
        "decay": float(layout.decay),
    }
    codec = layout.codec
    coded = any(bits < 16 for bits, _ in layout.rooms)
    pairs = len(layout.rotary.inv_freq) if codec.center and layout.tiers else 0
    key_width, value_width = triton.next_power_of_2(layout.key_dim), triton.next_power_of_2(layout.value_dim)
    launcher = _launcher(
        TYPE=TYPES[layout.dtype],
        KEY_DIM=layout.key_dim,
        KEY_WIDTH=key_width,
        VALUE_DIM=layout.value_dim,
        VALUE_WIDTH=value_width,
        TOKENS=min(static.BLOCK, ELEMENTS // max(key_width, value_width)),
        BITS=tuple(bits for bits, _ in layout.rooms),
        WIDTHS=tuple(bits for bits, _ in layout.rooms if bits < 16),
        RECENCY=layout.score == "recency",
        DECAYS=bool(layout.decay),
        FRAME=codec.frame_size(layout.key_dim, layout.value_dim) if layout.tiers else 0,
        HADAMARD=codec.hadamard and coded,
        SYMMETRIC=codec.symmetric,
        PAIRS=pairs,
        INTERLEAVED=layout.rotary.interleaved,
    )
    table = turns(layout.rotary, device) if pairs else None
    return _Prepared(launcher, (layout.batch * layout.kv_heads, 1, 1), numbers, trait(tuple(numbers.values())), table)


def append(buffer: torch.Tensor, state: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layout: Layout) -> None:
    """As `reference.append`. The host reads nothing and waits for nothing, so a CUDA graph can be captured."""
    plan = prepared(layout, buffer.device)
    if plan is None:
        twin.append(buffer, state, keys, values, layout)
        return
    keys, values, table = contiguous_rows(keys), contiguous_rows(values), plan.table
    if table is None:
        table = buffer  # which is not read as such
    elif table.is_cuda and torch.cuda.is_current_stream_capturing():
        turns(layout.rotary, buffer.device)  # so that it is kept for the graph
    key_batch, key_head, *_ = keys.stride()
    value_batch, value_head, *_ = values.stride()
    strides = {"key_batch": key_batch, "key_head": key_head, "value_batch": value_batch, "value_head": value_head}
    known = (
        plan.trait,
        keys.dtype,
        values.dtype,
        buffer.data_ptr() % 16,
        state.data_ptr() % 16,
        keys.data_ptr() % 16,
        values.data_ptr() % 16,
        max(key_batch, key_head, value_batch, value_head) < 1 << 31 or trait((*strides.values(),)),
    )
    with on_device(buffer):
        plan.launcher(
            plan.grid,
            {"buffer": buffer, "state": state, "keys": keys, "values": values, "table": table},
            {**strides, **plan.numbers},
            known,
        )
