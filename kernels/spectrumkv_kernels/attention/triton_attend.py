"""Second of the three kernels of the attention: all that reads keys and values."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .. import segment
from ..codec.triton_quantize import scale_of, zero_of
from .triton_counts import counted, first_tile, length_of, tokens_of
from .triton_dot import LOG2E, SUBNORMAL, dot, log2, pad, plane, plane_of_three, shifted
from .triton_places import place_of, processor_of

TILE = tl.constexpr(segment.TILE)
START = tl.constexpr(segment.START)
WEIGHT_PEAK = tl.constexpr(14)
"""Binary logarithm of the largest weight on a value code; float16 then holds weights down to 2**-38 of it."""


@triton.jit
def _capped(s, bias, softcap, SOFTCAP: tl.constexpr):
    """Scores in units of log2, the cap having been put on them in natural units; a bias of -inf stays."""
    if SOFTCAP:
        s = softcap * (2 * tl.sigmoid(2 * s / softcap) - 1) * LOG2E + bias
    return s


@triton.jit
def _hidden(
    s, token, live, positions, q_at, row_mask, mask_stride, mask_columns, mask_lowest, length, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, RAGGED: tl.constexpr, MASK: tl.constexpr, COUNTED: tl.constexpr,
    RING: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Scores `[N, R]`, in units of log2, with what a row may not see at -inf.

    `positions` is where those of the tokens lie; of a ring, where one follows another, the first; where they are
    packed, what `_unpacked` has found.
    """
    if CAUSAL or WINDOW or RAGGED or MASK != "none":
        if PACKED:
            position = positions
        else:
            position = positions + token
            if not RING:
                position = tl.load(position, mask=live, other=-1)
        position = position[:, None]
        seen = live[:, None]
        if RAGGED:
            seen = seen & (position >= 0)
        if CAUSAL:
            seen = seen & (position <= q_at[None, :])
        if WINDOW:
            seen = seen & (position > q_at[None, :] - window)
        if MASK != "none":
            if COUNTED is None:
                column = position - (length - mask_columns)
                seen = seen & (column >= 0)
            else:
                column = position
                seen = seen & (column < mask_columns)
            entry = tl.load(row_mask[None, :] + column.to(tl.int64) * mask_stride, mask=seen, other=0)
            if MASK == "bool":
                seen = seen & (entry != 0)
            else:
                s += entry.to(tl.float32) * LOG2E
                seen = seen & (entry.to(tl.float32) > mask_lowest)
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def _bytes(words):
    """Sum of the four bytes of each word."""
    pairs = (words & 0x00FF00FF) + (words >> 8 & 0x00FF00FF)
    return pairs + (pairs >> 16) & 0xFFFF


@triton.jit
def _unpacked(tiles, first, N: tl.constexpr):
    """Positions, int32 `[N]`, of the tokens from `first` on, a multiple of `N`, from packed tiles; see `segment.py`.

    In the order of `_order`: a word has the steps of four tokens, and sums that go over words stay within a warp, which
    has to wait for no other one. Behind the last token steps are 0.
    """
    words = (tiles + first // TILE * (START + TILE)).to(tl.pointer_type(tl.uint32))
    steps = tl.load(words + START // 4 + tl.arange(0, TILE // 4))[None, :]
    ahead = _bytes(steps & (0xFFFFFFFF >> (24 - 8 * tl.arange(0, 4).to(tl.uint32)))[:, None])
    whole = tl.broadcast_to(_bytes(steps), [4, TILE // 4])
    found = (tl.load(words) + tl.cumsum(whole, 1) - whole + ahead).to(tl.int32)
    if N < TILE:
        part = tl.arange(0, TILE // N)[None, :, None] == first // N % (TILE // N)
        found = tl.sum(tl.where(part, tl.reshape(found, [4, TILE // N, N // 4]), 0), 1)
    return tl.reshape(found, [N])


@triton.jit
def _order(N: tl.constexpr):
    """The order in which `N` tokens in codes are read: the first of every four, then the second, and so on."""
    lane = tl.arange(0, N)
    return lane % (N // 4) * 4 + lane // (N // 4)


@triton.jit
def _affine(stored, token, SYMMETRIC: tl.constexpr, BITS: tl.constexpr):
    """Scale and zero point of `token`, float32, by one read: of 4 bytes if it can be, as no fewer are pipelined.

    Codes that store no zero point get 0; theirs is `zero_of` times the scale.
    """
    zero = tl.zeros(token.shape, tl.float32)
    if stored.dtype.element_ty == tl.uint8:
        address = stored.to(tl.int64)
        words = (address & -4).to(tl.pointer_type(tl.uint32))
        at = (address & 3).to(tl.int32) + token
        scale = scale_of(tl.load(words + (at >> 2)) >> ((at & 3) << 3) & 255, BITS)
    elif SYMMETRIC:
        scale = tl.load(stored + token).to(tl.float32)
    else:
        both = tl.load(stored.to(tl.pointer_type(tl.uint32)) + token)
        scale = both.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        zero = (both >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, zero


@triton.jit
def _plane(words, lowest, j: tl.constexpr, BITS: tl.constexpr):
    """The `j`th code of every word; of codes of 3 bits `lowest` has a part, of 1 bit all."""
    if BITS == 1:
        x = plane(lowest, 8 * (j % 2), 1 << (2 * (j // 2)))
    elif BITS == 3:
        x = plane_of_three(words, lowest, 8 * (j % 2), 1 << (2 * (j // 2)))
    else:
        x = plane(words, 8 * (j % 2), (2**BITS - 1) << (BITS * (j // 2)))
    return x


INTEGERS = [
    *("length", "mask_batch", "mask_head", "mask_query", "mask_stride", "mask_columns"),
    *("rotated_at", "state_at", "factor_at", "kv_heads", "rows", "queries", "places", "splits", "window", "recent"),
    *("ticket_at", "own"),
]
"""Arguments for whose values nothing is compiled anew."""


@triton.jit(do_not_specialize=INTEGERS)
def attend_kernel(
    query,  # [batch * kv_heads, rows, D]
    halves,  # of `prepare_kernel`
    floats,  # sums [batch * kv_heads, splits, rows, DV]; reference exponent and sum [.., rows, 2]; 0, -1; factor
    segments,  # of each: keys, values, positions; of coded ones scales and zero points of keys, of values
    mask,  # its columns are the last positions; COUNTED: the first ones
    counts,  # COUNTED: of `counted`
    totals,  # COUNTED: tokens of each segment but the tail, [blocks tiered, segments - 1]
    sizes,  # of each: tokens, tokens that fit, as 2n + 3 (never 1 nor divisible by 16, so nothing is recompiled)
    length,
    mask_batch,
    mask_head,
    mask_query,
    mask_stride,
    mask_columns,
    mask_lowest,
    columns,  # COUNTED: of each its column in `totals`, as 2n + 3
    rotated_at,
    state_at,
    factor_at,
    kv_heads,
    rows,
    queries,
    places,  # positions for whose scores of the mean there is room
    splits,
    window,
    recent,  # COUNTED: of `counted`
    ticket_at,
    own,  # CLAIMS: of `place_of`
    scale,
    softcap,
    BITS: tl.constexpr,
    SHARED: tl.constexpr,
    PACKED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    R: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    MEAN: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    RAGGED: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TILES: tl.constexpr,
    TIMES: tl.constexpr,
    STAGES: tl.constexpr,
    CLAIMS: tl.constexpr,
    PROCESSORS: tl.constexpr,
    COUNTED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Attention of the rows of one KV head over a share of all segments.

    Tokens are rows of the products and queries, which are few, columns: those come in eights, rows in sixteens.

    Where `COUNTED` is not None, how many tokens there are is read on the device. The last segment is the tail then, a
    ring in which the token at position `p` lies at `p - origin` modulo its size.
    """
    # Of every share the heads, and blocks of their rows, stand one after another.
    number = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    if CLAIMS:
        tickets = (floats + ticket_at).to(tl.pointer_type(tl.int32))
        if own > 0:
            many = tl.num_programs(0) * tl.num_programs(1)
            number = place_of(tickets, processor_of(number), many, own, PROCESSORS)
    share, of = number // tl.num_programs(0), number % tl.num_programs(0)
    if ROWS_PAD <= R:
        bh = of.to(tl.int64)
        first = 0
    else:
        blocks = tl.cdiv(rows, R)
        bh = (of // blocks).to(tl.int64)
        first = of % blocks * R
    row = first + tl.arange(0, R)
    real = row < rows
    if COUNTED is None:
        done, tail = 0, length
    else:
        length, done, tail, origin = counted(counts, recent, COUNTED)
        tail = tl.maximum(tail, length - (sizes[len(BITS) - 1][1] - 3) // 2)  # a ring holds no more
    q_at = length - queries + row % queries
    head = (bh % kv_heads) * (rows // queries) + row // queries
    row_mask = mask + (bh // kv_heads) * mask_batch + head * mask_head
    row_mask += (row % queries).to(tl.int64) * mask_query
    shares = tl.num_programs(1)
    whole = length_of(sizes, columns, totals, done, length - tail, len(BITS), TILES, TIMES, COUNTED)
    here, beyond = share.to(tl.int64) * whole // shares, (share + 1).to(tl.int64) * whole // shares
    before = tl.full([], 0, tl.int64)
    for i in tl.static_range(len(BITS)):
        room = (sizes[i][1] - 3) // 2
        size = tokens_of(sizes, columns, totals, done, length - tail, i, len(BITS), COUNTED)
        tiles = tl.cdiv(size, TILES[i])
        begin = first_tile(here, before, tiles, TIMES[i]) * TILES[i]
        end = tl.minimum(first_tile(beyond, before, tiles, TIMES[i]) * TILES[i], size)
        # A share fills the places from the segment in which it begins to that in which the next one does.
        reached = before <= beyond
        before += tiles * TIMES[i]
        at_row = (bh * splits + share + i) * rows + row
        if begin >= end:
            if ((before > here) | (share == 0)) & (reached | (share == shares - 1)):
                tl.store(floats + state_at + at_row * 2, tl.full([R], float("-inf"), tl.float32), mask=real)
                tl.store(floats + state_at + at_row * 2 + 1, tl.zeros([R], tl.float32), mask=real)
        else:
            # Tokens are counted from `begin` on: the offsets of a program's own fit 32 bits, those from the start of
            # all rows, heads and tokens need not.
            count = end - begin
            N: tl.constexpr = TILES[i]
            RING: tl.constexpr = COUNTED is not None and i == len(BITS) - 1
            if RING:
                positions = tail + begin
                slot = (positions - origin) % room
                base = bh * room + slot
            else:
                base = bh * room + begin
                positions = segments[i][2] + (begin if SHARED[i] else base)
                if PACKED[i]:
                    positions = segments[i][2] + bh * (tl.cdiv(size, TILE) * (START + TILE))
            out = floats + at_row[None, :] * DV
            m = tl.full([R], float("-inf"), tl.float32)
            total = tl.zeros([N, R], tl.float32)
            if BITS[i] == 16:
                BLOCK_D: tl.constexpr = pad(D)
                BLOCK_V: tl.constexpr = pad(DV)
                d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
                keys = segments[i][0] + base * D
                values = segments[i][1] + base * DV
                q = tl.load(query + (bh * rows + row)[None, :] * D + d[:, None], mask=real[None, :] & (d < D)[:, None])
                q = tl.where(real[None, :] & (d < D)[:, None], q, 0.0).to(keys.dtype.element_ty)
                acc = tl.zeros([BLOCK_V, R], tl.float32)
                # Next to tiers exact tokens are few, and shall not take the room by which programs are counted.
                for start in tl.range(0, count, N, num_stages=STAGES - (BITS[0] < 16)):
                    token = start + tl.arange(0, N)
                    live = token < count
                    place = token
                    if RING:
                        place = tl.where(slot + token < room, token, token - room)
                    k = tl.load(keys + place[:, None] * D + d[None, :], mask=live[:, None] & (d < D), other=0)
                    bias = tl.where(live, 0.0, float("-inf"))[:, None]
                    s = dot(k, q, tl.zeros([N, R], tl.float32)) * scale + bias
                    s = _capped(s, bias, softcap, SOFTCAP)
                    s = _hidden(
                        s, token, live, positions, q_at, row_mask, mask_stride, mask_columns, mask_lowest, length,
                        window, CAUSAL, WINDOW, RAGGED, "bool" if MASK == "folded" else MASK, COUNTED, RING, False,
                    )  # fmt: skip
                    peak = tl.maximum(m, tl.max(s, axis=0))
                    safe = tl.where(peak == float("-inf"), 0.0, peak)
                    alpha = tl.exp2(m - safe)[None, :]
                    m = peak
                    p = tl.exp2(s - safe[None, :])
                    total = total * alpha + p
                    v = tl.load(
                        values + place[None, :] * DV + dv[:, None], mask=live[None, :] & (dv < DV)[:, None], other=0
                    )
                    acc = dot(v, p.to(v.dtype), acc * alpha)
                tl.store(out + dv[:, None], acc, mask=real[None, :] & (dv < DV)[:, None])
            else:
                # Of codes of 3 bits these are the words of the upper two; those of the lowest lie behind them. Codes of
                # 1 bit are such lowest bits alone: so no plane has fewer channels than an operand is padded to.
                LOWEST: tl.constexpr = BITS[i] == 3 or BITS[i] == 1
                B: tl.constexpr = 2 if LOWEST else BITS[i]
                WK: tl.constexpr = D * B // 16
                WV: tl.constexpr = DV * B // 16
                KEY: tl.constexpr = D * BITS[i] // 16
                VALUE: tl.constexpr = DV * BITS[i] // 16
                wk, wv = tl.arange(0, pad(WK)), tl.arange(0, pad(WV))
                WIDE: tl.constexpr = 1 if SYMMETRIC else 2
                keys = segments[i][0].to(tl.pointer_type(tl.int16)) + base * KEY
                values = segments[i][1].to(tl.pointer_type(tl.int16)) + base * VALUE
                key_affine = segments[i][3] + base * WIDE
                value_affine = segments[i][4] + base * WIDE
                ZERO: tl.constexpr = zero_of(BITS[i], segments[i][3].dtype)
                unit = tl.load(floats + factor_at + (bh * rows + row) * 2, mask=real, other=1.0)
                spread = unit * tl.load(floats + factor_at + (bh * rows + row) * 2 + 1, mask=real, other=0.0)
                planes = ()  # of the query, each [pad(WK), R], for one code of every word
                accs = ()  # of the output, each [pad(WV), R]
                for j in tl.static_range(16 // B):
                    channel = 2 * wk + j % 2 + j // 2 * (2 * WK)
                    q = tl.load(
                        halves + rotated_at + (bh * rows + row)[None, :] * D + channel[:, None],
                        mask=real[None, :] & (wk < WK)[:, None], other=0,
                    )  # fmt: skip
                    planes = planes + ((q * 2.0 ** (-B * (j // 2))).to(tl.float16),)
                    accs = accs + (tl.zeros([pad(WV), R], tl.float32),)
                C: tl.constexpr = min(ROWS_PAD, R)
                term = first + tl.arange(0, C)
                zeros = tl.zeros([N, R], tl.float32)
                if LOWEST:
                    # 0 or -1 by the half of the words. It comes from memory, since the compiler brings loads into the
                    # layout of operands before what is computed from them, but not what it counts itself.
                    half = (floats + (factor_at - 2)).to(tl.pointer_type(tl.int16))
                    key_half = tl.load(half + tl.minimum(wk // (WK // 2), 1))[None, :]
                    value_half = tl.load(half + tl.minimum(wv // (WV // 2), 1))[:, None]
                order = _order(N)
                for start in tl.range(0, count, N, num_stages=STAGES):
                    token = start + order
                    live = token < count
                    # What is read for places past the last token counts for nothing; it has to be there to be read.
                    place = tl.minimum(token, count - 1)
                    k, kl = 0, 0
                    if BITS[i] != 1:
                        k = tl.load(keys + place[:, None] * KEY + wk[None, :], mask=(wk < WK)[None, :], other=0)
                    if LOWEST:
                        kl = tl.load(
                            keys + place[:, None] * KEY + (KEY - WK // 2 + wk % (WK // 2))[None, :],
                            mask=(wk < WK)[None, :], other=0,
                        )  # fmt: skip
                        kl = shifted(kl, key_half)
                    ks, kz = _affine(key_affine, place, SYMMETRIC, BITS[i])
                    vs, vz = _affine(value_affine, place, SYMMETRIC, BITS[i])
                    s = tl.zeros([N, R], tl.float32)
                    for j in tl.static_range(16 // B):
                        s = dot(_plane(k, kl, j, BITS[i]), planes[j], s)
                    bias = tl.where(live, 0.0, float("-inf"))[:, None]
                    if SYMMETRIC:  # zeros are a multiple of scales
                        s = (s * unit[None, :] + (ZERO * spread)[None, :]) * ks[:, None] + bias
                    else:
                        s = s * (unit[None, :] * ks[:, None]) + (spread[None, :] * kz[:, None] + bias)
                    where = positions
                    if PACKED[i]:
                        where = _unpacked(positions, begin + start, N)
                    if MEAN:
                        at = where
                        if not PACKED[i]:
                            at = tl.maximum(tl.load(positions + place), 0)
                        scored = halves + (bh * places + at)[:, None] * ROWS_PAD + term[None, :]
                        c = tl.load(scored)
                        if C < R:  # the columns past the last row are for nothing
                            c = tl.reshape(tl.broadcast_to(c[:, None, :], [N, R // C, C]), [N, R])
                        s += c
                        if MASK == "folded":  # half the least number of float16, with which it is hidden
                            s = tl.where(s < -32752.0, float("-inf"), s)
                    s = _capped(s, bias, softcap, SOFTCAP)
                    s = _hidden(
                        s, token, live, where, q_at, row_mask, mask_stride, mask_columns, mask_lowest, length,
                        window, CAUSAL, WINDOW, RAGGED, "none" if MASK == "folded" else MASK, COUNTED, RING, PACKED[i],
                    )  # fmt: skip
                    # The reference exponent is that of p times the value's scale, so that float16 holds the product.
                    t = s + log2(tl.maximum(vs, 2.0**-24))[:, None]
                    peak = tl.maximum(m, tl.max(t, axis=0) - WEIGHT_PEAK)
                    safe = tl.where(peak == float("-inf"), 0.0, peak)
                    alpha = tl.exp2(m - safe)[None, :]
                    m = peak
                    p = tl.exp2(s - safe[None, :])
                    total = total * alpha + p
                    w = (p * vs[:, None]).to(tl.float16)
                    zeros = zeros * alpha + (w.to(tl.float32) if SYMMETRIC else p * vz[:, None])
                    v, vl = 0, 0
                    if BITS[i] != 1:
                        v = tl.load(values + place[None, :] * VALUE + wv[:, None], mask=(wv < WV)[:, None], other=0)
                    if LOWEST:
                        vl = tl.load(
                            values + place[None, :] * VALUE + (VALUE - WV // 2 + wv % (WV // 2))[:, None],
                            mask=(wv < WV)[:, None], other=0,
                        )  # fmt: skip
                        vl = shifted(vl, value_half)
                    new = ()
                    for j in tl.static_range(16 // B):
                        new = new + (dot(_plane(v, vl, j, BITS[i]), w, accs[j] * alpha),)
                    accs = new
                low = tl.sum(zeros, axis=0)[None, :]
                if SYMMETRIC:
                    low *= ZERO
                for j in tl.static_range(16 // B):
                    channel = 2 * wv + j % 2 + j // 2 * (2 * WV)
                    acc = accs[j] * (SUBNORMAL * 2.0 ** (-B * (j // 2))) + low
                    tl.store(out + channel[:, None], acc, mask=real[None, :] & (wv < WV)[:, None])
            tl.store(floats + state_at + at_row * 2, m, mask=real)
            tl.store(floats + state_at + at_row * 2 + 1, tl.sum(total, axis=0), mask=real)
    if OVERLAPS:
        gdc_launch_dependents()
