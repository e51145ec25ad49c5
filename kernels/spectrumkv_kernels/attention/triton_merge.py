"""Last of the three kernels of the attention: joins the parts."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from ..rotation.triton_hadamard import hadamard
from .triton_counts import chunk_of, counted, refused, tokens_of
from .triton_dot import LOG2E

INTEGERS = ["state_at", "rows", "queries", "kv_heads", "splits", "coded", "shares", "recent"]
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
    chunks,  # likewise
    state_at,
    rows,
    queries,
    kv_heads,
    splits,  # parts that there is room for
    shares,  # COUNTED: programs that share a segment
    recent,  # COUNTED: of `counted`
    coded,  # the first splits that hold sums of codes, which are to be rotated back
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    FRAME: tl.constexpr,
    FITTED: tl.constexpr,
    HADAMARD: tl.constexpr,
    SINKS: tl.constexpr,
    S: tl.constexpr,
    TILES: tl.constexpr,
    CODED: tl.constexpr,  # segments in codes
    COUNTED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Join the parts of one row. Grid: batch x heads x rows."""
    if OVERLAPS:
        gdc_wait()
    parts = splits
    if COUNTED is not None:
        length, done, tail, _ = counted(counts, recent, COUNTED)
        tail = tl.maximum(tail, length - (sizes[len(TILES) - 1][1] - 3) // 2)
        parts = 0
        for k in tl.static_range(len(TILES)):
            size = tokens_of(totals, done, length - tail, chunks[k], k, len(TILES))
            parts += tl.cdiv(size, chunk_of(size, shares, TILES[k]))
            if k == CODED - 1:
                coded = parts
    state = partial + state_at
    bh = (tl.program_id(0) // rows).to(tl.int64)
    row = tl.program_id(0) % rows
    d = tl.arange(0, BLOCK)
    top = tl.full([4 * S], float("-inf"), tl.float32)
    for start in range(0, parts, 4 * S):
        i = start + tl.arange(0, 4 * S)
        top = tl.maximum(
            top, tl.load(state + ((bh * splits + i) * rows + row) * 2, mask=i < parts, other=float("-inf"))
        )
    peak = tl.max(top, axis=0)
    if SINKS:
        sink = tl.load(sinks + (bh % kv_heads) * (rows // queries) + row // queries).to(tl.float32) * LOG2E
        peak = tl.maximum(peak, sink)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([S], tl.float32)
    turned = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([S], tl.float32)  # of coded tokens
    for start in range(0, parts, S):
        i = start + tl.arange(0, S)
        there = i < parts
        at = (bh * splits + i) * rows + row
        weight = tl.exp2(tl.load(state + at * 2, mask=there, other=float("-inf")) - peak)
        weights = weight * tl.load(state + at * 2 + 1, mask=there, other=0.0)
        total += weights
        x = tl.load(partial + at[:, None] * DV + d[None, :], mask=there[:, None] & (d < DV)[None, :], other=0.0)
        x *= weight[:, None]
        if FITTED:
            mass += tl.where(i < coded, weights, 0.0)
        if HADAMARD or FITTED:
            turned += tl.sum(tl.where((i < coded)[:, None], x, 0.0), axis=0)
            plain += tl.sum(tl.where((i < coded)[:, None], 0.0, x), axis=0)
        else:
            plain += tl.sum(x, axis=0)
    if HADAMARD:
        SIZE: tl.constexpr = DV & -DV
        turned = tl.reshape(hadamard(tl.reshape(turned, (1, BLOCK)), SIZE), (BLOCK,)) * SIZE**-0.5
    if FITTED:
        values = frame + bh * FRAME + (FRAME - DV - 1)
        fixed = coded > 0  # else there may be no frame yet
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
