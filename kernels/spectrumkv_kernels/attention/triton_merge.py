"""Last of the three kernels of the attention: joins the parts."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from ..rotation.triton_hadamard import hadamard
from .triton_counts import counted, length_of, refused
from .triton_dot import LOG2E

INTEGERS = ["state_at", "rows", "queries", "kv_heads", "splits", "shares", "recent"]
"""Arguments for whose values nothing is compiled anew."""


@triton.jit(do_not_specialize=INTEGERS)
def merge_kernel(
    partial,  # of `attend_kernel`
    sinks,  # [heads]
    frame,  # FITTED: [batch * kv_heads, FRAME] float32, whose last ones are the mean of values and their scale
    counts,  # COUNTED: of `counted`
    totals,  # COUNTED: as in `attend_kernel`
    out,  # [batch * kv_heads, rows, DV]
    sizes,  # as in `attend_kernel`
    columns,  # likewise
    state_at,
    rows,
    queries,
    kv_heads,
    splits,  # places for parts
    shares,  # programs that share the segments
    recent,  # COUNTED: of `counted`
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    FRAME: tl.constexpr,
    FITTED: tl.constexpr,
    HADAMARD: tl.constexpr,
    SINKS: tl.constexpr,
    S: tl.constexpr,
    TILES: tl.constexpr,
    TIMES: tl.constexpr,
    CODED: tl.constexpr,  # segments in codes, which come first: their sums are to be rotated back
    COUNTED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Join the parts of one row. Grid: batch x heads x rows."""
    if COUNTED is None:
        done, tail = 0, 0
    else:
        length, done, tail, _ = counted(counts, recent, COUNTED)
        tail = length - tl.maximum(tail, length - (sizes[len(TILES) - 1][1] - 3) // 2)
    whole = length_of(sizes, columns, totals, done, tail, len(TILES), TILES, TIMES, COUNTED)
    turning = length_of(sizes, columns, totals, done, tail, CODED, TILES, TIMES, COUNTED)
    # The first place of an exact part: `share * whole // shares <= turning` for no later share.
    coded = CODED + ((turning + 1) * shares - 1) // tl.maximum(whole, 1)
    bh = (tl.program_id(0) // rows).to(tl.int64)
    row = tl.program_id(0) % rows
    d = tl.arange(0, BLOCK)
    peak = tl.full([], float("-inf"), tl.float32)
    if SINKS:
        sink = tl.load(sinks + (bh % kv_heads) * (rows // queries) + row // queries).to(tl.float32) * LOG2E
        peak = sink
    total = tl.zeros([S], tl.float32)
    mass = tl.zeros([S], tl.float32)  # of coded tokens
    turned = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    if OVERLAPS:
        gdc_wait()
    for start in range(0, splits, S):
        place = start + tl.arange(0, S)
        there = place < splits
        at = (bh * splits + place) * rows + row
        reference = tl.load(partial + state_at + at * 2, mask=there, other=float("-inf"))
        part = tl.load(partial + state_at + at * 2 + 1, mask=there, other=0.0)
        x = tl.load(partial + at[:, None] * DV + d[None, :], mask=there[:, None] & (d < DV)[None, :], other=0.0)
        before, peak = peak, tl.maximum(peak, tl.max(reference, axis=0))
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        alpha = tl.exp2(before - safe)
        weight = tl.exp2(reference - safe)
        seen = (reference > float("-inf")) | (part != 0)  # else there is no part, and its place was not written
        part = tl.where(seen, weight * part, 0.0)
        total = total * alpha + part
        x = tl.where(seen[:, None], x * weight[:, None], 0.0)
        if FITTED:
            mass = mass * alpha + tl.where(place < coded, part, 0.0)
        if HADAMARD or FITTED:
            turned = turned * alpha + tl.sum(tl.where((place < coded)[:, None], x, 0.0), axis=0)
            plain = plain * alpha + tl.sum(tl.where((place < coded)[:, None], 0.0, x), axis=0)
        else:
            plain = plain * alpha + tl.sum(x, axis=0)
    if HADAMARD:
        SIZE: tl.constexpr = DV & -DV
        turned = tl.reshape(hadamard(tl.reshape(turned, (1, BLOCK)), SIZE), (BLOCK,)) * SIZE**-0.5
    if FITTED:
        values = frame + bh * FRAME + (FRAME - DV - 1)
        fixed = turning > 0  # else there may be no frame yet
        mean = tl.load(values + d, mask=fixed & (d < DV), other=0.0)
        turned = turned * tl.load(values + DV, mask=fixed, other=0.0) + tl.sum(mass, axis=0) * mean
    if HADAMARD or FITTED:
        plain += turned
    norm = tl.sum(total, axis=0)
    if SINKS:
        norm += tl.exp2(sink - peak)
    plain /= tl.where(norm > 0, norm, 1.0)
    if COUNTED is not None:
        plain = tl.where(refused(counts, COUNTED), float("nan"), plain)
    tl.store(out + (bh * rows + row) * DV + d, plain, mask=d < DV)
