"""Triton twin of `attention`: decode attention that reads only the compressed bytes.

Three launches: the queries are prepared, every program then reads one stretch of one segment for one KV head and row
of the batch, and the parts are merged.
"""

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from spectrumkv_kernels import attention
from spectrumkv_kernels.attention import Segment
from spectrumkv_kernels.codec import Codec
from spectrumkv_kernels.hadamard import hadamard_matrix
from spectrumkv_kernels.quantize import Quantized
from spectrumkv_kernels.rotary import Rotary

LOG2E = math.log2(math.e)
FINE = 128
"""Positions that share one coarse rotation: `exp(i t f) = exp(i 128 (t // 128) f) exp(i (t % 128) f)`."""
QUERY_PEAK = 1024.0
"""Rotated queries are scaled to this peak, so that float16 holds them with 11 bits whatever their size."""
WEIGHT_PEAK = tl.constexpr(14)
"""Binary logarithm of the largest weight on a value code; float16 then holds weights down to 2**-38 of it."""
SUBNORMAL = tl.constexpr(2.0**24)
"""An integer n in the low bits of a float16 is the subnormal number n * 2**-24."""
PACKED = tl.constexpr(not triton.knobs.runtime.interpret)
"""Bit operations on two words at a time, in assembly, which the interpreter lacks."""
ROWS = 64
"""Query rows of one program at most."""
PREPARED = 32
"""Query rows that are prepared together."""
TURNED = 16
"""Query rows that are rotated together."""
SHARE_BYTES = 1 << 14
"""A program reads this much at least."""
TILE = {16: 16, 8: 64, 4: 64, 2: 64}
"""Tokens of an iteration, by bits."""
STAGES = 3
"""Depth of the pipeline of loads."""
OPTIONS = {"num_warps": 2, "maxnreg": 168}
RESIDENT = 6
"""Programs with these options that a multiprocessor holds at once."""
PREPARE_OPTIONS = {"num_warps": 4}
PREPARE_RESIDENT = 4


@triton.constexpr_function
def _pad(n):
    """Size of a block that holds `n` and that `tl.dot` takes."""
    return max(16, triton.next_power_of_2(n))


@triton.jit
def _dot(a, b, acc):
    """`acc + a @ b` in float32."""
    if not PACKED:  # the interpreter multiplies the bit patterns of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["rotated_at", "factor_at", "rows", "flat", "turning", "row_blocks", "blocks", "length"])
def _prepare_kernel(
    query,  # [flat, rows, D]
    signs,  # [D, D] in the dtype of query: Hadamard matrix of 1 and -1
    mean,  # [flat, D] float32
    fine,  # [POSITIONS, 2 * PAIRS] float16: cos and -sin of t f
    coarse,  # [positions / POSITIONS, 2 * PAIRS] float32: cos and sin of POSITIONS t f
    halves,
    floats,
    rotated_at,
    factor_at,
    rows,
    flat,
    turning,
    row_blocks,
    blocks,
    length,
    scale,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HADAMARD: tl.constexpr,
    MEAN: tl.constexpr,
    PEAK: tl.constexpr,
    POSITIONS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    TURNED: tl.constexpr,
    R: tl.constexpr,
):
    """The first `turning` programs rotate and scale queries for coded keys; the others score the mean at every position.

    `flat` is batch times KV heads. Results, in the workspaces `halves` and `floats`:
        offset: q . R(t) mean, `[flat, length, ROWS_PAD]`, first in `halves`.
        rotated: The rotated queries, `[flat, rows, D]`, from `rotated_at` on in `halves`.
        factor: Unit of the codes' products, and sum of the rotated query in that unit, `[flat, rows, 2]`, from
            `factor_at` on in `floats`.
    """
    BLOCK_D: tl.constexpr = _pad(D)
    d = tl.arange(0, BLOCK_D)
    if tl.program_id(0) < turning:
        rotated, factor = halves + rotated_at, floats + factor_at
        line = tl.program_id(0) * TURNED + tl.arange(0, TURNED)
        given = line < flat * rows
        x = tl.load(query + line[:, None] * D + d[None, :], mask=given[:, None] & (d < D), other=0.0)
        if HADAMARD:
            h = tl.load(signs + d[:, None] * D + d[None, :], mask=(d < D)[:, None] & (d < D), other=0.0)
            x = _dot(x, h, tl.zeros([TURNED, BLOCK_D], tl.float32))
        x = x.to(tl.float32)
        peak = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-30)
        x = (x * (PEAK / peak)[:, None]).to(tl.float16)
        norm = scale * SUBNORMAL / PEAK
        if HADAMARD:
            norm *= (D & -D) ** -0.5
        tl.store(rotated + line[:, None] * D + d[None, :], x, mask=given[:, None] & (d < D))
        tl.store(factor + line * 2, peak * norm, mask=given)
        tl.store(factor + line * 2 + 1, tl.sum(x.to(tl.float32), axis=1) / SUBNORMAL, mask=given)
    elif MEAN:
        pid = tl.program_id(0) - turning
        place = pid % row_blocks * R + tl.arange(0, R)
        head, row = place // ROWS_PAD, place % ROWS_PAD
        real = (row < rows) & (head < flat)
        at = head * rows + row
        rest = tl.zeros([R], tl.float32)
        if 2 * PAIRS < D:
            fixed = ((d >= 2 * PAIRS) & (d < D))[None, :] & real[:, None]
            q = tl.load(query + at[:, None] * D + d[None, :], mask=fixed, other=0.0).to(tl.float32) * scale
            rest = tl.sum(q * tl.load(mean + head[:, None] * D + d[None, :], mask=fixed, other=0.0), axis=1)
        pair = tl.arange(0, _pad(PAIRS))
        live = pair < PAIRS
        first, second = pair[:, None], pair[:, None] + PAIRS
        if INTERLEAVED:
            first, second = pair[:, None] * 2, pair[:, None] * 2 + 1
        known = live[:, None] & real[None, :]
        qx = tl.load(query + at[None, :] * D + first, mask=known, other=0.0).to(tl.float32) * scale
        qy = tl.load(query + at[None, :] * D + second, mask=known, other=0.0).to(tl.float32) * scale
        mx = tl.load(mean + head[None, :] * D + first, mask=known, other=0.0)
        my = tl.load(mean + head[None, :] * D + second, mask=known, other=0.0)
        re, im = qx * mx + qy * my, qx * my - qy * mx  # conj(q) m
        # float16 holds them after division by the largest there can be.
        size = tl.maximum(tl.sqrt(tl.max(re * re + im * im, axis=0)), 1e-30)
        re, im = re / size[None, :], im / size[None, :]
        t = tl.arange(0, POSITIONS)
        cos = tl.load(fine + t[:, None] * (2 * PAIRS) + pair[None, :], mask=live[None, :], other=0.0)
        sin = tl.load(fine + t[:, None] * (2 * PAIRS) + PAIRS + pair[None, :], mask=live[None, :], other=0.0)
        out = halves + head.to(tl.int64) * length * ROWS_PAD + row
        start = pid // row_blocks * blocks
        stop = tl.minimum(start + blocks, tl.cdiv(length, POSITIONS))
        c = tl.load(coarse + start * (2 * PAIRS) + pair, mask=live & (start < stop), other=0.0)
        s = tl.load(coarse + start * (2 * PAIRS) + PAIRS + pair, mask=live & (start < stop), other=0.0)
        for block in range(start, stop):
            x = (re * c[:, None] - im * s[:, None]).to(tl.float16)
            y = (re * s[:, None] + im * c[:, None]).to(tl.float16)
            ahead = (block + 1) * (2 * PAIRS) + pair
            c = tl.load(coarse + ahead, mask=live & (block + 1 < stop), other=0.0)
            s = tl.load(coarse + ahead + PAIRS, mask=live & (block + 1 < stop), other=0.0)
            scores = _dot(sin, y, _dot(cos, x, tl.zeros([POSITIONS, R], tl.float32)))
            scores = tl.clamp(scores * size[None, :] + rest[None, :], -65504.0, 65504.0)
            position = block * POSITIONS + t
            mask = (position < length)[:, None] & (head < flat)[None, :]
            tl.store(out[None, :] + position[:, None] * ROWS_PAD, scores.to(tl.float16), mask=mask)


@triton.jit
def _plane(words, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """One code of every 16-bit word, as the subnormal float16 with its bits: two bit operations a pair, no conversion."""
    if PACKED:
        if SHIFT == 0:
            return tl.inline_asm_elementwise(
                f"and.b32 $0, $1, {MASK * 0x10001};", "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
            )
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shr.b32 t, $1, {SHIFT}; and.b32 $0, t, {MASK * 0x10001}; }}",
            "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    return ((words >> SHIFT) & MASK).to(tl.float16, bitcast=True)


@triton.jit
def _capped(s, bias, softcap, SOFTCAP: tl.constexpr):
    """Scores in units of log2, the cap having been put on them in natural units; a bias of -inf stays."""
    if SOFTCAP:
        s = softcap * (2 * tl.sigmoid(2 * s / softcap) - 1) * 1.4426950408889634 + bias
    return s


@triton.jit
def _hidden(
    s, token, live, positions, q_at, row_mask, mask_stride, mask_first, mask_lowest, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, RAGGED: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Scores `[N, R]`, in units of log2, with what a row may not see at -inf."""
    if CAUSAL or WINDOW or RAGGED or MASK != "none":
        position = tl.load(positions + token, mask=live, other=-1)[:, None]
        seen = live[:, None]
        if RAGGED:
            seen = seen & (position >= 0)
        if CAUSAL:
            seen = seen & (position <= q_at[None, :])
        if WINDOW:
            seen = seen & (position > q_at[None, :] - window)
        if MASK != "none":
            column = position - mask_first
            seen = seen & (column >= 0)
            entry = tl.load(row_mask[None, :] + column.to(tl.int64) * mask_stride, mask=seen, other=0)
            if MASK == "bool":
                seen = seen & (entry != 0)
            else:
                s += entry.to(tl.float32) * 1.4426950408889634
                seen = seen & (entry.to(tl.float32) > mask_lowest)
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def _affine(stored, token, live, SYMMETRIC: tl.constexpr, BITS: tl.constexpr):
    """Scale and zero point of `token`, float32, by one read."""
    if SYMMETRIC:
        scale = tl.load(stored + token, mask=live, other=0.0).to(tl.float32)
        return scale, scale * -(2.0 ** (BITS - 1))
    both = tl.load(stored.to(tl.pointer_type(tl.uint32)) + token, mask=live, other=0)
    scale = both.to(tl.uint16).to(tl.float16, bitcast=True)
    zero = (both >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), zero.to(tl.float32)


INTEGERS = ["rotated_at", "state_at", "factor_at", "kv_heads", "rows", "queries", "length", "splits", "mask_batch", "mask_head", "mask_query", "mask_stride",
            "mask_first", "window"]  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def _attend_kernel(
    query,  # [batch * kv_heads, rows, D]
    halves,  # of `_prepare_kernel`
    floats,  # partial sums [batch * kv_heads, splits, rows, DV]; reference exponent and sum [.., rows, 2]; factor
    segments,  # of each: keys, values, positions; of coded ones scales and zero points of keys, of values
    sizes,  # of each: tokens, tokens that fit, as 2n + 3 (never 1 nor divisible by 16, so nothing is recompiled)
    chunks,  # of each: tokens that a program reads, likewise
    mask,
    rotated_at,
    state_at,
    factor_at,
    kv_heads,
    rows,
    queries,
    length,
    splits,
    mask_batch,
    mask_head,
    mask_query,
    mask_stride,
    mask_first,
    mask_lowest,
    window,
    scale,
    softcap,
    BITS: tl.constexpr,
    SHARED: tl.constexpr,
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
    STAGES: tl.constexpr,
):
    """Attention of the rows of one KV head over a share of every segment.

    Tokens are rows of the products and queries, which are few, columns: those come in eights, rows in sixteens.
    """
    if ROWS_PAD <= R:
        bh = tl.program_id(0).to(tl.int64)
        row = tl.arange(0, R)
    else:
        blocks = tl.cdiv(rows, R)
        bh = (tl.program_id(0) // blocks).to(tl.int64)
        row = tl.program_id(0) % blocks * R + tl.arange(0, R)
    real = row < rows
    q_at = length - queries + row % queries
    head = (bh % kv_heads) * (rows // queries) + row // queries
    row_mask = mask + (bh // kv_heads) * mask_batch + head * mask_head + (row % queries) * mask_query
    part = tl.program_id(1)
    for i in tl.static_range(len(BITS)):
        size = (sizes[i][0] - 3) // 2
        room = (sizes[i][1] - 3) // 2
        chunk = (chunks[i] - 3) // 2
        begin = tl.program_id(1) * chunk
        if begin < size:
            end = tl.minimum(begin + chunk, size)
            at_row = (bh * splits + part) * rows + row
            out = floats + at_row[None, :] * DV
            positions = segments[i][2]
            if not SHARED[i]:
                positions += bh * room
            N: tl.constexpr = TILES[i]
            m = tl.full([R], float("-inf"), tl.float32)
            total = tl.zeros([N, R], tl.float32)
            if BITS[i] == 16:
                BLOCK_D: tl.constexpr = _pad(D)
                BLOCK_V: tl.constexpr = _pad(DV)
                d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
                keys = segments[i][0] + bh * room * D
                values = segments[i][1] + bh * room * DV
                q = tl.load(query + (bh * rows + row)[None, :] * D + d[:, None], mask=real[None, :] & (d < D)[:, None])
                q = tl.where(real[None, :] & (d < D)[:, None], q, 0.0).to(keys.dtype.element_ty)
                acc = tl.zeros([BLOCK_V, R], tl.float32)
                for start in tl.range(begin, end, N, num_stages=STAGES):
                    token = start + tl.arange(0, N)
                    live = token < end
                    k = tl.load(keys + token[:, None] * D + d[None, :], mask=live[:, None] & (d < D), other=0)
                    bias = tl.where(live, 0.0, float("-inf"))[:, None]
                    s = _dot(k, q, tl.zeros([N, R], tl.float32)) * scale + bias
                    s = _capped(s, bias, softcap, SOFTCAP)
                    s = _hidden(
                        s, token, live, positions, q_at, row_mask, mask_stride, mask_first, mask_lowest, window,
                        CAUSAL, WINDOW, RAGGED, MASK,
                    )  # fmt: skip
                    peak = tl.maximum(m, tl.max(s, axis=0))
                    safe = tl.where(peak == float("-inf"), 0.0, peak)
                    alpha = tl.exp2(m - safe)[None, :]
                    m = peak
                    p = tl.exp2(s - safe[None, :])
                    total = total * alpha + p
                    v = tl.load(
                        values + token[None, :] * DV + dv[:, None], mask=live[None, :] & (dv < DV)[:, None], other=0
                    )
                    acc = _dot(v, p.to(v.dtype), acc * alpha)
                tl.store(out + dv[:, None], acc, mask=real[None, :] & (dv < DV)[:, None])
            else:
                B: tl.constexpr = BITS[i]
                WK: tl.constexpr = D * B // 16
                WV: tl.constexpr = DV * B // 16
                wk, wv = tl.arange(0, _pad(WK)), tl.arange(0, _pad(WV))
                WIDE: tl.constexpr = 1 if SYMMETRIC else 2
                keys = segments[i][0].to(tl.pointer_type(tl.int16)) + bh * room * WK
                values = segments[i][1].to(tl.pointer_type(tl.int16)) + bh * room * WV
                key_affine = segments[i][3] + bh * room * WIDE
                value_affine = segments[i][4] + bh * room * WIDE
                unit = tl.load(floats + factor_at + (bh * rows + row) * 2, mask=real, other=1.0)
                spread = tl.load(floats + factor_at + (bh * rows + row) * 2 + 1, mask=real, other=0.0)
                planes = ()
                accs = ()
                for j in tl.static_range(16 // B):
                    channel = 2 * wk + j % 2 + j // 2 * (2 * WK)
                    q = tl.load(
                        halves + rotated_at + (bh * rows + row)[None, :] * D + channel[:, None],
                        mask=real[None, :] & (wk < WK)[:, None], other=0,
                    )  # fmt: skip
                    planes = planes + ((q * 2.0 ** (-B * (j // 2))).to(tl.float16),)
                    accs = accs + (tl.zeros([_pad(WV), R], tl.float32),)
                # A row's score of the mean comes as one more channel of the key.
                term = tl.arange(0, _pad(ROWS_PAD))
                pick = (term[:, None] == row[None, :]).to(tl.float16)
                zeros = tl.zeros([N, R], tl.float32)
                for start in tl.range(begin, end, N, num_stages=STAGES):
                    token = start + tl.arange(0, N)
                    live = token < end
                    k = tl.load(keys + token[:, None] * WK + wk[None, :], mask=live[:, None] & (wk < WK), other=0)
                    ks, kz = _affine(key_affine, token, live, SYMMETRIC, B)
                    vs, vz = _affine(value_affine, token, live, SYMMETRIC, B)
                    s = tl.zeros([N, R], tl.float32)
                    for j in tl.static_range(16 // B):
                        s = _dot(_plane(k, 8 * (j % 2), (2**B - 1) << (B * (j // 2))), planes[j], s)
                    bias = tl.where(live, 0.0, float("-inf"))[:, None]
                    s = unit[None, :] * (s * ks[:, None] + (spread[None, :] * kz[:, None] + bias))
                    if MEAN:
                        at = tl.maximum(tl.load(positions + token, mask=live, other=0), 0)
                        place = halves + bh * length * ROWS_PAD + at[:, None] * ROWS_PAD + term[None, :]
                        c = tl.load(place, mask=live[:, None] & (term < ROWS_PAD), other=0.0)
                        s += _dot(c, pick, tl.zeros([N, R], tl.float32))
                    s = _capped(s, bias, softcap, SOFTCAP)
                    s = _hidden(
                        s, token, live, positions, q_at, row_mask, mask_stride, mask_first, mask_lowest, window,
                        CAUSAL, WINDOW, RAGGED, MASK,
                    )  # fmt: skip
                    # The reference exponent is that of p times the value's scale, so that float16 holds the product.
                    t = s + tl.log2(tl.maximum(vs, 2.0**-24))[:, None]
                    peak = tl.maximum(m, tl.max(t, axis=0) - WEIGHT_PEAK)
                    safe = tl.where(peak == float("-inf"), 0.0, peak)
                    alpha = tl.exp2(m - safe)[None, :]
                    m = peak
                    p = tl.exp2(s - safe[None, :])
                    total = total * alpha + p
                    zeros = zeros * alpha + p * vz[:, None]
                    w = (p * vs[:, None]).to(tl.float16)
                    v = tl.load(
                        values + token[None, :] * WV + wv[:, None], mask=live[None, :] & (wv < WV)[:, None], other=0
                    )
                    new = ()
                    for j in tl.static_range(16 // B):
                        x = _plane(v, 8 * (j % 2), (2**B - 1) << (B * (j // 2)))
                        new = new + (_dot(x, w, accs[j] * alpha),)
                    accs = new
                low = tl.sum(zeros, axis=0)[None, :]
                for j in tl.static_range(16 // B):
                    channel = 2 * wv + j % 2 + j // 2 * (2 * WV)
                    acc = accs[j] * (SUBNORMAL * 2.0 ** (-B * (j // 2))) + low
                    tl.store(out + channel[:, None], acc, mask=real[None, :] & (wv < WV)[:, None])
            tl.store(floats + state_at + at_row * 2, m, mask=real)
            tl.store(floats + state_at + at_row * 2 + 1, tl.sum(total, axis=0), mask=real)
        part += tl.cdiv(size, chunk)


@triton.jit
def _sign(i, j):
    """Entry of the Hadamard matrix: the parity of the bits that `i` and `j` share."""
    x = i & j
    x ^= x >> 4
    x ^= x >> 2
    x ^= x >> 1
    return 1.0 - 2.0 * (x & 1).to(tl.float32)


@triton.jit
def _hadamard(x, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Orthonormal Hadamard transform of every `SIZE` of the `BLOCK` elements, as a product of two small ones."""
    LOW: tl.constexpr = min(SIZE, 16)
    HIGH: tl.constexpr = SIZE // LOW
    i = tl.arange(0, LOW)
    x = tl.reshape(x, (BLOCK // LOW, LOW, 1)) * _sign(i[:, None], i[None, :])[None, :, :]
    x = tl.sum(x, axis=1)
    if HIGH > 1:
        i = tl.arange(0, HIGH)
        x = tl.reshape(x, (BLOCK // SIZE, HIGH, 1, LOW)) * _sign(i[:, None], i[None, :])[None, :, :, None]
        x = tl.sum(x, axis=1)
    return tl.reshape(x, (BLOCK,)) * SIZE**-0.5


@triton.jit(do_not_specialize=["state_at", "rows", "queries", "kv_heads", "splits", "coded"])
def _merge_kernel(
    partial,  # of `_attend_kernel`
    sinks,  # [heads]
    out,  # [batch * kv_heads, rows, DV]
    state_at,
    rows,
    queries,
    kv_heads,
    splits,
    coded,  # the first splits that hold sums of codes, which are to be rotated back
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    HADAMARD: tl.constexpr,
    SINKS: tl.constexpr,
    S: tl.constexpr,
):
    """Join the parts of one row."""
    state = partial + state_at
    bh = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    d = tl.arange(0, BLOCK)
    top = tl.full([S], float("-inf"), tl.float32)
    for start in range(0, splits, S):
        i = start + tl.arange(0, S)
        top = tl.maximum(
            top, tl.load(state + ((bh * splits + i) * rows + row) * 2, mask=i < splits, other=float("-inf"))
        )
    peak = tl.max(top, axis=0)
    if SINKS:
        sink = tl.load(sinks + (bh % kv_heads) * (rows // queries) + row // queries).to(tl.float32) * 1.4426950408889634
        peak = tl.maximum(peak, sink)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([S], tl.float32)
    turned = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    for start in range(0, splits, S):
        i = start + tl.arange(0, S)
        at = (bh * splits + i) * rows + row
        weight = tl.exp2(tl.load(state + at * 2, mask=i < splits, other=float("-inf")) - peak)
        total += weight * tl.load(state + at * 2 + 1, mask=i < splits, other=0.0)
        x = tl.load(partial + at[:, None] * DV + d[None, :], mask=(i < splits)[:, None] & (d < DV)[None, :], other=0.0)
        x *= weight[:, None]
        if HADAMARD:
            turned += tl.sum(tl.where((i < coded)[:, None], x, 0.0), axis=0)
            plain += tl.sum(tl.where((i < coded)[:, None], 0.0, x), axis=0)
        else:
            plain += tl.sum(x, axis=0)
    if HADAMARD:
        plain += _hadamard(turned, DV & -DV, BLOCK)
    norm = tl.sum(total, axis=0)
    if SINKS:
        norm += tl.exp2(sink - peak)
    plain /= tl.where(norm > 0, norm, 1.0)
    tl.store(out + (bh * rows + row) * DV + d, plain, mask=d < DV)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.lru_cache(maxsize=4096)
def _shares(heads: int, most: int, device: torch.device) -> int:
    """How many programs, `most` at most, share the tokens of each of `heads`: the fewest that keep the device busy."""
    slots = RESIDENT * _multiprocessors(device)
    most = max(1, min(most, 4 * slots // heads))

    def busy(shares: int) -> float:
        waves = heads * shares / slots
        return waves / math.ceil(waves)

    best = max(map(busy, range(1, most + 1)))
    return next(n for n in range(1, most + 1) if busy(n) >= 0.95 * best)


def _tables(rotary: Rotary, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and -sin of the first `FINE` positions, float16, and cos and sin of every `FINE`th one, float32."""
    return _tables_for(rotary, max(1 << (length - 1).bit_length(), 4096), device)


@functools.lru_cache(maxsize=32)
def _tables_for(rotary: Rotary, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    if not rotary.inv_freq:
        empty = torch.zeros(1, device=device)
        return empty.half(), empty
    angles = torch.tensor(rotary.inv_freq, dtype=torch.float64)
    fine = torch.arange(FINE, dtype=torch.float64)[:, None] * angles
    coarse = torch.arange(0, length, FINE, dtype=torch.float64)[:, None] * angles
    fine = torch.cat((fine.cos(), -fine.sin()), dim=-1).half()
    return fine.to(device), torch.cat((coarse.cos(), coarse.sin()), dim=-1).float().to(device)


def _room(segment: Segment) -> int | None:
    """Tokens that the buffers behind a segment hold for each row and head; None where they are laid out otherwise."""
    bits, keys, values, positions = segment
    batch, heads, tokens = positions.shape
    if bits < 16:
        tensors = (*keys, *values, positions)
        return tokens if all(t.is_contiguous() for t in tensors) else None
    rooms = set()
    for t in (keys, values):
        strides, dim = t.stride(), t.shape[3]
        room = strides[1] // dim if heads > 1 else strides[0] // dim if batch > 1 else tokens
        if strides[3] != 1 or (tokens > 1 and strides[2] != dim):
            return None
        if (heads > 1 and strides[1] != room * dim) or (batch > 1 and strides[0] != heads * room * dim):
            return None
        rooms.add(room)
    if not _shared(positions):
        rooms.add(tokens if positions.is_contiguous() else -1)
    return rooms.pop() if len(rooms) == 1 else None


def _shared(positions: torch.Tensor) -> bool:
    """All rows and heads have the same positions, held once."""
    return positions.stride()[:2] == (0, 0) and positions.stride(2) == 1


def _contiguous(segment: Segment) -> Segment:
    def whole(stored: Any) -> Any:
        if isinstance(stored, Quantized):
            return Quantized(*(t.contiguous() for t in stored))
        return stored.contiguous()

    return Segment(segment.bits, whole(segment.keys), whole(segment.values), segment.positions.contiguous())


def tiered_attention(
    query: torch.Tensor,
    segments: Sequence[Segment],
    *,
    length: int,
    scale: float,
    codec: Codec,
    mean: torch.Tensor | None,
    rotary: Rotary,
    mask: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    ragged: bool = False,
) -> torch.Tensor:
    """As `attention.tiered_attention`, up to the rounding of queries and weights to 11 bits for coded tokens.

    Nothing is compiled anew as lengths grow, and the host waits for nothing. A CUDA graph can be captured: replays
    read what lies in the same tensors then; positions of -1, with `ragged`, mark places that no token has taken yet.
    """
    coded = [s for s in segments if s.bits < 16 and s.positions.shape[-1]]
    exact = [s for s in segments if s.bits == 16 and s.positions.shape[-1]]
    held = coded + exact
    batch, heads, queries, dim = query.shape
    value_dim, wide = _value_dim(held[0]), 128 if query.dtype == torch.float32 else 256
    if max(dim, value_dim) > wide or any(d * s.bits % 16 for s in coded for d in (dim, value_dim)):
        return attention.tiered_attention(
            query, segments, length=length, scale=scale, codec=codec, mean=mean, rotary=rotary, mask=mask,
            window=window, softcap=softcap, sinks=sinks, ragged=ragged,
        )  # fmt: skip
    rooms = [_room(s) for s in held]
    if None in rooms:
        held = [s if room is not None else _contiguous(s) for s, room in zip(held, rooms, strict=True)]
        rooms = [_room(s) for s in held]
    device, query = query.device, query.contiguous()
    kv_heads = held[0].positions.shape[1]
    flat, rows = batch * kv_heads, heads // kv_heads * queries
    bits = tuple([s.bits for s in held])
    shared = tuple([_shared(s.positions) for s in held])
    plan = _plan(rows, dim, value_dim, bits, shared, query.dtype, device)
    # With a cap the scores must be in natural units first; else exp2 saves a product.
    units = scale if softcap is not None else scale * LOG2E
    centred = mean is not None and bool(coded)
    turned = codec.hadamard and bool(coded)

    sizes = [s.positions.shape[-1] for s in held]
    read = sum([cost * size for cost, size in zip(plan.costs, sizes, strict=True)])
    shares = _shares(flat * plan.row_blocks, read // SHARE_BYTES, device)
    chunks = [-(-size // (shares * tile)) * tile for size, tile in zip(sizes, plan.tiles, strict=True)]
    counts = [-(-size // chunk) for size, chunk in zip(sizes, chunks, strict=True)]
    splits = sum(counts)

    rotated_at = -(-flat * length * plan.rows_pad // 8) * 8 if centred else 0
    state_at = flat * splits * rows * value_dim
    factor_at = state_at + flat * splits * rows * 2
    halves = torch.empty(rotated_at + flat * rows * dim, dtype=torch.float16, device=device)
    floats = torch.empty(factor_at + flat * rows * 2, dtype=torch.float32, device=device)
    out = torch.empty((batch, heads, queries, value_dim), dtype=query.dtype, device=device)
    with _on(query):
        if coded:
            turning, scoring, row_blocks, each = -(-flat * rows // TURNED), 0, 1, 1
            fine = coarse = query
            if centred:
                fine, coarse = _tables(rotary, length, device)
                row_blocks, parts = -(-flat * plan.rows_pad // PREPARED), -(-length // FINE)
                each = -(-parts * row_blocks // (PREPARE_RESIDENT * _multiprocessors(device)))
                scoring = row_blocks * -(-parts // each)
            _prepare_kernel[(turning + scoring,)](
                query, plan.signs if codec.hadamard else query, mean if centred else query, fine, coarse,
                halves, floats, rotated_at, factor_at, rows, flat, turning, row_blocks, each, length, units,
                D=dim, PAIRS=len(rotary.inv_freq), INTERLEAVED=rotary.interleaved, HADAMARD=codec.hadamard,
                MEAN=centred, PEAK=QUERY_PEAK, POSITIONS=FINE, ROWS_PAD=plan.rows_pad, TURNED=TURNED, R=PREPARED,
                **PREPARE_OPTIONS,
            )  # fmt: skip
        if mask is None:
            masked, strides, kind, lowest, columns = query, (0, 0, 0, 0), "none", 0.0, length
        else:
            masked, strides, kind, lowest, columns = _masking(mask)
        _attend_kernel[(flat * plan.row_blocks, max(counts))](
            query, halves, floats, tuple([_pointers(s) for s in held]),
            tuple([(2 * size + 3, 2 * room + 3) for size, room in zip(sizes, rooms, strict=True)]),
            tuple([2 * chunk + 3 for chunk in chunks]), masked, rotated_at, state_at, factor_at,
            kv_heads, rows, queries, length, splits, *strides, length - columns, lowest, window or 0, units,
            softcap or 0.0, BITS=bits, SHARED=shared, D=dim, DV=value_dim, R=plan.columns, ROWS_PAD=plan.rows_pad,
            SYMMETRIC=codec.symmetric, MEAN=centred, CAUSAL=queries > 1 and mask is None,
            WINDOW=window is not None and mask is None, RAGGED=ragged, MASK=kind, SOFTCAP=softcap is not None,
            TILES=plan.tiles, STAGES=STAGES, **OPTIONS,
        )  # fmt: skip
        _merge_kernel[(flat, rows)](
            floats, query if sinks is None else sinks, out, state_at, rows, queries, kv_heads, splits,
            sum(counts[: len(coded)]), DV=value_dim, BLOCK=plan.block, HADAMARD=turned, SINKS=sinks is not None, S=32,
        )  # fmt: skip
    return out


class _Plan(NamedTuple):
    """What does not change while a cache grows.

    Attributes:
        rows_pad: Query rows of a KV head, rounded up to a power of two.
        columns: Of them in one program.
        row_blocks: Programs for all of them.
        costs: Bytes that a token of each segment takes to read.
        tiles: Tokens of one iteration, of each segment.
        block: Channels of a value, rounded up to a power of two.
        signs: The Hadamard matrix for queries, of 1 and -1.
    """

    rows_pad: int
    columns: int
    row_blocks: int
    costs: tuple[int, ...]
    tiles: tuple[int, ...]
    block: int
    signs: torch.Tensor


@functools.lru_cache(maxsize=256)
def _plan(
    rows: int,
    dim: int,
    value_dim: int,
    bits: tuple[int, ...],
    shared: tuple[bool, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> _Plan:
    rows_pad = triton.next_power_of_2(rows)
    columns = min(max(rows_pad, 8), ROWS)
    block = triton.next_power_of_2(value_dim)
    wide = max(triton.next_power_of_2(dim), block, 128)
    return _Plan(
        rows_pad=rows_pad,
        columns=columns,
        row_blocks=-(-rows // columns),
        costs=tuple((dim + value_dim) * b // 8 + (12 + 2 * rows_pad if b < 16 else 0) for b in bits),
        tiles=tuple(max(TILE[b] * 128 // wide, 16) for b in bits),
        block=block,
        signs=hadamard_matrix(dim, device).sign().to(dtype),
    )


def _masking(mask: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...], str, float, int]:
    """The mask for the kernel, its strides, kind, what hides and how many columns it has."""
    sizes, strides = mask.shape, mask.stride()
    strides = (*(0 if n == 1 else s for n, s in zip(sizes[:3], strides[:3], strict=True)), strides[3])
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8), strides, "bool", 0.0, sizes[3]
    return mask, strides, "additive", torch.finfo(mask.dtype).min / 2, sizes[3]


def _on(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def _value_dim(segment: Segment) -> int:
    values = segment.values
    return values.codes.shape[-1] * 8 // segment.bits if isinstance(values, Quantized) else values.shape[-1]


def _pointers(segment: Segment) -> tuple[Any, ...]:
    keys, values, positions = segment.keys, segment.values, segment.positions
    if not isinstance(keys, Quantized):
        return keys, values, positions
    return keys.codes, values.codes, positions, keys.affine, values.affine
