"""The two kernels of `key_mean`."""

import triton
import triton.language as tl

from ..rotation.triton_rotary import partner, turn


@triton.jit(do_not_specialize=["tokens"])
def sums_kernel(
    keys, positions, weights, table, sums, tokens, heads, key_batch, key_head, key_token,
    DIM: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Sums over `SPLIT` tokens of keys times cosine and keys times sine. Grid: splits x batch x heads."""
    splits = tl.cdiv(tokens, SPLIT)
    split = tl.program_id(0) % splits
    row = (tl.program_id(0) // splits).to(tl.int64)
    batch, head = row // heads, row % heads
    keys += batch * key_batch + head * key_head
    channels = tl.arange(0, WIDTH)
    along = tl.zeros([TOKENS, WIDTH], tl.float32)
    across = tl.zeros([TOKENS, WIDTH], tl.float32)
    for i in range(SPLIT // TOKENS):
        token = split * SPLIT + i * TOKENS + tl.arange(0, TOKENS)
        inside = token < tokens
        place = keys + token.to(tl.int64)[:, None] * key_token + channels[None, :]
        x = tl.load(place, mask=inside[:, None] & (channels < DIM)[None, :], other=0.0).to(tl.float32)
        if weights is not None:
            weight = tl.load(weights + batch * tokens + token, mask=inside, other=0.0)[:, None]
            x = tl.where(weight != 0, x * weight, 0.0)
        if PAIRS:
            at = tl.load(positions + token, mask=inside, other=0)
            cos, sin = turn(table, at, channels, PAIRS, INTERLEAVED)
            along += x * cos
            across += x * sin
        else:
            along += x
    sums += (row * splits + split) * 2 * WIDTH
    tl.store(sums + channels, tl.sum(along, 0))
    if PAIRS:
        tl.store(sums + WIDTH + channels, tl.sum(across, 0))


@triton.jit(do_not_specialize=["splits"])
def mean_kernel(
    sums, total, mean, splits, heads,
    DIM: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Mean of the splits' sums, turned back. Grid: batch x heads."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, WIDTH)
    acc = tl.zeros([SPLITS, WIDTH], tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        place = sums + (row * splits + split)[:, None] * 2 * WIDTH
        acc += tl.load(place + channels[None, :], mask=(split < splits)[:, None], other=0.0)
        if PAIRS:
            other, sign = partner(channels, PAIRS, INTERLEAVED)
            turned = (split < splits)[:, None] & (channels < 2 * PAIRS)[None, :]
            acc -= tl.load(place + WIDTH + other[None, :], mask=turned, other=0.0) * sign[None, :]
    weight = tl.load(total + row // heads)
    weight = tl.where(weight > 0, weight, 1.0)
    tl.store(mean + row * DIM + channels, tl.sum(acc, 0) / weight, mask=channels < DIM)
