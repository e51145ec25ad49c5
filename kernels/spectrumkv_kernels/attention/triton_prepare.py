"""First of the three kernels of the attention: queries for coded keys, and the scores of the mean."""

import triton
import triton.language as tl

from ..rotation.triton_hadamard import hadamard
from .triton_counts import counted
from .triton_dot import SUBNORMAL, dot, pad

INTEGERS = [
    *("mask_batch", "mask_stride", "mask_columns", "rotated_at", "factor_at", "rows", "flat", "turning"),
    *("row_blocks", "blocks", "places", "recent", "kv_heads", "ticket_at"),
]
"""Arguments for whose values nothing is compiled anew."""


@triton.jit(do_not_specialize=INTEGERS)
def prepare_kernel(
    query,  # [flat, rows, D]
    frame,  # [flat, FRAME] float32: mean of keys; FITTED: the scales of their channels, then more
    fine,  # [POSITIONS, 2 * PAIRS] float16: cos and sin of t f
    coarse,  # [positions / POSITIONS, 2 * PAIRS] float32: cos and sin of POSITIONS t f
    halves,
    floats,
    counts,  # COUNTED: of `counted`
    mask,  # FOLDS: of each row of the batch and position
    mask_batch,
    mask_stride,
    mask_columns,
    rotated_at,
    factor_at,
    rows,
    flat,
    turning,
    row_blocks,
    blocks,
    places,  # positions for whose scores there is room
    recent,  # COUNTED: of `counted`
    kv_heads,
    ticket_at,
    scale,
    D: tl.constexpr,
    FRAME: tl.constexpr,
    FITTED: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HADAMARD: tl.constexpr,
    MEAN: tl.constexpr,
    PEAK: tl.constexpr,
    POSITIONS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    TURNED: tl.constexpr,
    R: tl.constexpr,
    FOLDS: tl.constexpr,
    ALIKE: tl.constexpr,  # all places of a program are of one row of the batch
    PROCESSORS: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """The first `turning` programs rotate and scale queries for coded keys, the others score the mean.

    `flat` is batch times KV heads. Results, in the workspaces `halves` and `floats`:
        offset: q . R(t) mean, `[flat, places, ROWS_PAD]`, first in `halves`.
        rotated: The rotated queries, `[flat, rows, D]`, from `rotated_at` on in `halves`.
        factor: Unit of the codes' products, and sum of the rotated query in that unit, `[flat, rows, 2]`, from
            `factor_at` on in `floats`. Before it lie 0 and -1, int16.
        tickets: As `place_of` takes them, from `ticket_at` on in `floats`.

    Where it folds the mask in, the offset of a position that it hides is the least number of float16.

    Scored are all `places`, or where `COUNTED` is not None the positions before the tail.
    """
    BLOCK_D: tl.constexpr = pad(D)
    d = tl.arange(0, BLOCK_D)
    if tl.program_id(0) == 0:
        tl.store(
            (floats + (factor_at - 2)).to(tl.pointer_type(tl.int16)) + tl.arange(0, 2), -tl.arange(0, 2).to(tl.int16)
        )
        tickets = (floats + ticket_at).to(tl.pointer_type(tl.int32))
        for some in range(0, PROCESSORS + 1, POSITIONS):
            ticket = some + tl.arange(0, POSITIONS)
            tl.store(tickets + ticket, 0, mask=ticket <= PROCESSORS)
    if tl.program_id(0) < turning:
        rotated, factor = halves + rotated_at, floats + factor_at
        line = tl.program_id(0).to(tl.int64) * TURNED + tl.arange(0, TURNED)
        given = line < flat * rows
        x = tl.load(query + line[:, None] * D + d[None, :], mask=given[:, None] & (d < D), other=0.0).to(tl.float32)
        if FITTED:
            key_scale = frame + (line // rows)[:, None] * FRAME + (D + d)[None, :]
            x *= tl.load(key_scale, mask=given[:, None] & (d < D), other=0.0)
        if HADAMARD:
            x = hadamard(x, D & -D)  # its norm comes with the factor below
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
        scored = places
        if COUNTED is not None:
            _, _, scored, _ = counted(counts, recent, COUNTED)
            parts = tl.cdiv(scored, POSITIONS)
            blocks = tl.cdiv(parts, (tl.num_programs(0) - turning) // row_blocks)
            flat = tl.where(pid // row_blocks * blocks < parts, flat, 0)  # a program without positions reads no head
        place = pid % row_blocks * R + tl.arange(0, R)
        head, row = (place // ROWS_PAD).to(tl.int64), place % ROWS_PAD
        real = (row < rows) & (head < flat)
        at = head * rows + row
        rest = tl.zeros([R], tl.float32)
        if 2 * PAIRS < D:
            fixed = ((d >= 2 * PAIRS) & (d < D))[None, :] & real[:, None]
            q = tl.load(query + at[:, None] * D + d[None, :], mask=fixed, other=0.0).to(tl.float32) * scale
            rest = tl.sum(q * tl.load(frame + head[:, None] * FRAME + d[None, :], mask=fixed, other=0.0), axis=1)
        pair = tl.arange(0, pad(PAIRS))
        live = pair < PAIRS
        first, second = pair[:, None], pair[:, None] + PAIRS
        if INTERLEAVED:
            first, second = pair[:, None] * 2, pair[:, None] * 2 + 1
        known = live[:, None] & real[None, :]
        qx = tl.load(query + at[None, :] * D + first, mask=known, other=0.0).to(tl.float32) * scale
        qy = tl.load(query + at[None, :] * D + second, mask=known, other=0.0).to(tl.float32) * scale
        mx = tl.load(frame + head[None, :] * FRAME + first, mask=known, other=0.0)
        my = tl.load(frame + head[None, :] * FRAME + second, mask=known, other=0.0)
        # q . R(t) m = sum over pairs of cos(t f) (qx mx + qy my) + sin(t f) (qy mx - qx my)
        along, across = qx * mx + qy * my, qy * mx - qx * my  # [PAIRS, R]
        # float16 holds them after division by the largest there can be.
        size = tl.maximum(tl.sqrt(tl.max(along * along + across * across, axis=0)), 1e-30)
        along, across = along / size[None, :], across / size[None, :]
        t = tl.arange(0, POSITIONS)
        cos = tl.load(fine + t[:, None] * (2 * PAIRS) + pair[None, :], mask=live[None, :], other=0.0)
        sin = tl.load(fine + t[:, None] * (2 * PAIRS) + PAIRS + pair[None, :], mask=live[None, :], other=0.0)
        start = pid // row_blocks * blocks
        stop = tl.minimum(start + blocks, tl.cdiv(scored, POSITIONS))
        # A head's rows at all positions of a block lie side by side.
        SIDE: tl.constexpr = min(ROWS_PAD, R)
        LINE: tl.constexpr = POSITIONS * ROWS_PAD
        heads = (pid % row_blocks * R // ROWS_PAD + tl.arange(0, R // SIDE)).to(tl.int64)
        entry = tl.arange(0, POSITIONS * SIDE)
        out = halves + (heads * places * ROWS_PAD + start.to(tl.int64) * LINE)[:, None]
        if SIDE < ROWS_PAD:
            out += (entry // SIDE * ROWS_PAD + pid % row_blocks * R % ROWS_PAD + entry % SIDE)[None, :]
        else:
            out += entry[None, :]
        # Conditions on scalars decide how many pairs are read: Triton 3.9's interpreter takes no mask made from them.
        some = pair < tl.where(start < stop, PAIRS, 0)
        c = tl.load(coarse + start * (2 * PAIRS) + pair, mask=some, other=0.0)
        s = tl.load(coarse + start * (2 * PAIRS) + PAIRS + pair, mask=some, other=0.0)
        for block in range(start, stop):
            # Turned to the block's first position; the angles from there on are those of `fine`.
            x = (along * c[:, None] + across * s[:, None]).to(tl.float16)
            y = (across * c[:, None] - along * s[:, None]).to(tl.float16)
            ahead = (block + 1) * (2 * PAIRS) + pair
            some = pair < tl.where(block + 1 < stop, PAIRS, 0)
            c = tl.load(coarse + ahead, mask=some, other=0.0)
            s = tl.load(coarse + ahead + PAIRS, mask=some, other=0.0)
            scores = dot(sin, y, dot(cos, x, tl.zeros([POSITIONS, R], tl.float32)))
            scores = tl.clamp(scores * size[None, :] + rest[None, :], -65504.0, 65504.0)
            position = block * POSITIONS + t
            if FOLDS:
                if ALIKE:
                    of = mask + (pid % row_blocks * R // ROWS_PAD // kv_heads).to(tl.int64) * mask_batch
                    seen = tl.load(
                        of + position.to(tl.int64) * mask_stride,
                        mask=position < tl.minimum(scored, mask_columns),
                        other=0,
                    )[:, None]
                else:
                    of = mask + (head // kv_heads)[None, :] * mask_batch
                    there = (position < tl.minimum(scored, mask_columns))[:, None] & (head < flat)[None, :]
                    seen = tl.load(of + position.to(tl.int64)[:, None] * mask_stride, mask=there, other=0)
                scores = tl.where(seen != 0, scores, -65504.0)
            stored = tl.trans(tl.reshape(scores.to(tl.float16), [POSITIONS, R // SIDE, SIDE]), 1, 0, 2)
            there = (heads < flat)[:, None] & (block * POSITIONS + entry // SIDE < scored)[None, :]
            tl.store(out, tl.reshape(stored, [R // SIDE, POSITIONS * SIDE]), mask=there)
            out += LINE
