"""Triton twin of `codec.frame.fit_frame`, in three passes: each needs what the one before found in all tokens.

The first sums up the shapes of the keys' residuals, and the values. Of these follow the balance of the keys' channels
and the mean of values. By them the second sums up the logarithms of vectors' powers, and the third writes the frame.
Tokens are split over programs, and every sum is taken in a fixed order.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl

from ..backend.launch_triton import cdiv, launch, on_device, strides_of
from ..rotation.rotary import Rotary
from ..rotation.triton_rotary import partner, turns
from ..segment import contiguous_rows
from . import frame as twin
from .triton_codec import DTYPES, widths_of
from .triton_encode import load_residual

SPLIT = 256
"""Tokens that one program sums up."""
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
def _vectors(
    keys, values, positions, weights, mean, table, row, heads, first, tokens, all_tokens, every,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Tokens to fit by, from the `first` on, of a row and KV head.

    Returns:
        The keys' residuals and the values, float32 `[tokens, channels]`, 0 where there are none; which values there
        are; and the tokens' weights.
    """
    batch, head = row // heads, row % heads
    token = first + tl.arange(0, TOKENS)
    inside = token < tokens
    source = token * every
    at = tl.load(positions + source, mask=inside, other=0)
    weight = inside.to(tl.float32)
    if weights is not None:
        weight = tl.load(weights + batch * all_tokens + source, mask=inside, other=0.0)
    counted = weight != 0
    source = source.to(tl.int64)
    channels, value_channels = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    x = keys + batch * key_batch + head * key_head + (source * key_token)[:, None]
    mean += row * KEY_DIM
    y = load_residual(x, counted, at, mean, None, table, channels, KEY_DIM, PAIRS, INTERLEAVED, True)
    there = counted[:, None] & (value_channels < VALUE_DIM)[None, :]
    v = values + batch * value_batch + head * value_head + (source * value_token)[:, None] + value_channels[None, :]
    value = tl.load(v, mask=there, other=0.0).to(tl.float32)
    return tl.where(counted[:, None], y, 0.0), value, there, weight


@triton.jit
def _found(
    sums, query_power, row, splits,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """What the first pass has found for a row and KV head: the balance of keys' channels, and the mean of values."""
    channels, value_channels = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    inside = channels < KEY_DIM
    other, _ = partner(channels, PAIRS, INTERLEAVED) if PAIRS else (channels, channels)
    other = tl.where(channels < 2 * PAIRS, other, channels)
    power = tl.zeros([KEY_WIDTH], tl.float32)
    value = tl.zeros([VALUE_WIDTH], tl.float32)
    total = 0.0
    for split in range(splits):
        place = sums + (row * splits + split) * (KEY_WIDTH + VALUE_WIDTH + 1)
        power += (tl.load(place + channels) + tl.load(place + other)) * 0.5
        value += tl.load(place + KEY_WIDTH + value_channels)
        total += tl.load(place + KEY_WIDTH + VALUE_WIDTH)
    wanted = tl.where(inside, 1.0, 0.0)
    if query_power is not None:
        query_power += row * KEY_DIM
        wanted = tl.load(query_power + channels, mask=inside, other=0.0)
        wanted = (wanted + tl.load(query_power + other, mask=inside, other=0.0)) * 0.5
    weight = tl.where(total > 0, total, 1.0)
    return balance_of(power / weight, total, wanted, inside, KEY_DIM), value / weight


@triton.jit(do_not_specialize=["tokens", "all_tokens", "every"])
def power_kernel(
    keys, values, positions, weights, mean, table, sums, tokens, all_tokens, every, heads,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, SPLIT: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Sums over `SPLIT` tokens of keys' residuals' shapes, of values, and of weights. Grid: splits x batch x heads.

    Args:
        sums: float32 `[batch * heads, splits, KEY_WIDTH + VALUE_WIDTH + 1]`.
        tokens: To fit by, which are one of `every` among `all_tokens`.
    """
    splits = tl.cdiv(tokens, SPLIT)
    split, row = tl.program_id(0) % splits, (tl.program_id(0) // splits).to(tl.int64)
    channels, value_channels = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    power = tl.zeros([TOKENS, KEY_WIDTH], tl.float32)
    value = tl.zeros([TOKENS, VALUE_WIDTH], tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    for i in range(SPLIT // TOKENS):
        y, v, there, weight = _vectors(
            keys, values, positions, weights, mean, table, row, heads, split * SPLIT + i * TOKENS, tokens, all_tokens,
            every, key_batch, key_head, key_token, value_batch, value_head, value_token,
            KEY_DIM, KEY_WIDTH, VALUE_DIM, VALUE_WIDTH, TOKENS, PAIRS, INTERLEAVED,
        )  # fmt: skip
        y *= y
        size = tl.sum(y, 1) * (1 / KEY_DIM)
        power += y * (weight / tl.where(size > 0, size, 1.0))[:, None]
        value += v * weight[:, None]
        total += weight
    sums += (row * splits + split) * (KEY_WIDTH + VALUE_WIDTH + 1)
    tl.store(sums + channels, tl.sum(power, 0))
    tl.store(sums + KEY_WIDTH + value_channels, tl.sum(value, 0))
    tl.store(sums + KEY_WIDTH + VALUE_WIDTH, tl.sum(total, 0))


@triton.jit(do_not_specialize=["tokens", "all_tokens", "every"])
def size_kernel(
    keys, values, positions, weights, mean, table, sums, query_power, sizes, tokens, all_tokens, every, heads,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, SPLIT: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Sums over `SPLIT` tokens of `logarithms`, of balanced keys and then of values, `sizes`
    `[batch * heads, splits, 4]`. Grid: splits x batch x heads."""
    splits = tl.cdiv(tokens, SPLIT)
    split, row = tl.program_id(0) % splits, (tl.program_id(0) // splits).to(tl.int64)
    balance, value_mean = _found(
        sums, query_power, row, splits, KEY_DIM, KEY_WIDTH, VALUE_DIM, VALUE_WIDTH, PAIRS, INTERLEAVED
    )
    key_sum = tl.zeros([TOKENS], tl.float32)
    key_weight = tl.zeros([TOKENS], tl.float32)
    value_sum = tl.zeros([TOKENS], tl.float32)
    value_weight = tl.zeros([TOKENS], tl.float32)
    for i in range(SPLIT // TOKENS):
        y, v, there, weight = _vectors(
            keys, values, positions, weights, mean, table, row, heads, split * SPLIT + i * TOKENS, tokens, all_tokens,
            every, key_batch, key_head, key_token, value_batch, value_head, value_token,
            KEY_DIM, KEY_WIDTH, VALUE_DIM, VALUE_WIDTH, TOKENS, PAIRS, INTERLEAVED,
        )  # fmt: skip
        y *= balance[None, :]
        found, number = logarithms(tl.sum(y * y, 1) * (1 / KEY_DIM), weight)
        key_sum += found
        key_weight += number
        v = tl.where(there, v - value_mean[None, :], 0.0)
        found, number = logarithms(tl.sum(v * v, 1) * (1 / VALUE_DIM), weight)
        value_sum += found
        value_weight += number
    sizes += (row * splits + split) * 4
    tl.store(sizes, tl.sum(key_sum, 0))
    tl.store(sizes + 1, tl.sum(key_weight, 0))
    tl.store(sizes + 2, tl.sum(value_sum, 0))
    tl.store(sizes + 3, tl.sum(value_weight, 0))


@triton.jit(do_not_specialize=["splits"])
def frame_kernel(
    mean, sums, query_power, sizes, frame, splits,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The frame of a row and KV head. Grid: batch x heads."""
    row = tl.program_id(0).to(tl.int64)
    channels, value_channels = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    inside = channels < KEY_DIM
    balance, value_mean = _found(
        sums, query_power, row, splits, KEY_DIM, KEY_WIDTH, VALUE_DIM, VALUE_WIDTH, PAIRS, INTERLEAVED
    )
    key_sum, key_weight, value_sum, value_weight = 0.0, 0.0, 0.0, 0.0
    for split in range(splits):
        place = sizes + (row * splits + split) * 4
        key_sum += tl.load(place)
        key_weight += tl.load(place + 1)
        value_sum += tl.load(place + 2)
        value_weight += tl.load(place + 3)
    frame += row * (2 * KEY_DIM + VALUE_DIM + 1)
    tl.store(frame + channels, tl.load(mean + row * KEY_DIM + channels, mask=inside), mask=inside)
    tl.store(frame + KEY_DIM + channels, usual(key_sum, key_weight) / balance, mask=inside)
    tl.store(frame + 2 * KEY_DIM + value_channels, value_mean, mask=value_channels < VALUE_DIM)
    tl.store(frame + 2 * KEY_DIM + VALUE_DIM, usual(value_sum, value_weight))


def fit_frame(
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    rotary: Rotary,
    mean: torch.Tensor,
    weights: torch.Tensor | None = None,
    query_power: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `codec.frame.fit_frame`."""
    batch, heads, all_tokens, key_dim = keys.shape
    value_dim = values.shape[-1]
    known = keys.dtype in DTYPES and values.dtype in DTYPES and 2 * len(rotary.inv_freq) <= key_dim
    if not known or not keys.numel() or not values.numel():
        return twin.fit_frame(keys, values, positions, rotary, mean, weights, query_power)
    every = cdiv(all_tokens, twin.FITTED)
    tokens = cdiv(all_tokens, every)
    splits, rows = cdiv(tokens, SPLIT), batch * heads
    keys, values = contiguous_rows(keys), contiguous_rows(values)
    sizes = widths_of(key_dim, value_dim, 2048)
    block = sizes.pop("TOKENS")
    rotation = {"PAIRS": len(rotary.inv_freq), "INTERLEAVED": rotary.interleaved}
    numbers = (rows, splits, sizes["KEY_WIDTH"] + sizes["VALUE_WIDTH"] + 1)
    sums, logs = (torch.empty(*shape, device=keys.device) for shape in (numbers, (rows, splits, 4)))
    frame = torch.empty(batch, heads, twin.frame_size(True, key_dim, value_dim), device=keys.device)
    mean = mean.float().contiguous()
    found = {
        "sums": sums,
        "query_power": None if query_power is None else query_power.float().expand(mean.shape).contiguous(),
    }
    read = {
        "keys": keys,
        "values": values,
        "positions": positions.contiguous(),
        "weights": None if weights is None else weights.float().expand(batch, -1).contiguous(),
        "mean": mean,
        "table": turns(rotary, keys.device) if rotation["PAIRS"] else None,
    }
    lengths = {"tokens": tokens, "all_tokens": all_tokens, "every": every, "heads": heads}
    lengths |= {**strides_of("key", keys.stride()[:3]), **strides_of("value", values.stride()[:3])}
    split = {**sizes, "TOKENS": min(block, SPLIT), "SPLIT": SPLIT, **rotation}
    with on_device(keys):
        launch(power_kernel, (splits * rows,), {**read, "sums": sums}, lengths, split)
        launch(size_kernel, (splits * rows,), {**read, **found, "sizes": logs}, lengths, split)
        tensors = {"mean": mean, **found, "sizes": logs, "frame": frame}
        launch(frame_kernel, (rows,), tensors, {"splits": splits}, {**sizes, **rotation})
    return frame
