"""Counts that lie on the device: how full a layer of fixed capacity is."""

import triton
import triton.language as tl


@triton.jit
def counted(counts, recent, COUNTED: tl.constexpr):
    """Tokens seen, blocks that decoding has tiered, the position after the last of these, where the tail begins, and
    that where decoding began.

    `COUNTED` says which entries of `counts` are the tokens seen and the position at which decoding began to tier, which
    is other than 0 once a token was refused, and how many tokens a block has. `recent` of them stay in the tail.
    """
    length = tl.load(counts + COUNTED[0])
    base = tl.load(counts + COUNTED[1])
    done = tl.maximum(length - base - recent - 2, 0) // COUNTED[3]
    return length, done, base + done * COUNTED[3], base


@triton.jit
def tokens_of(sizes, columns, totals, done, tail, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, COUNTED: tl.constexpr):
    """Tokens of a segment.

    Where `COUNTED` is not None these are the tokens of an arena once `done` blocks have been tiered, or of the tail,
    which comes last. `columns` has that of the arena in the table of totals, `sizes` else the tokens, as `2n + 3`.
    """
    if COUNTED is None:
        return (sizes[SEGMENT][0] - 3) // 2
    elif SEGMENT == SEGMENTS - 1:
        return tail
    else:
        return tl.load(totals + done * (SEGMENTS - 1) + (columns[SEGMENT] - 3) // 2)


@triton.jit
def length_of(
    sizes, columns, totals, done, tail,
    FIRST: tl.constexpr, TILES: tl.constexpr, TIMES: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Length of the row in which the tiles of all segments stand, or of the `FIRST` of these: int64.

    Each tile is as long as it takes to read. The row is cut into shares of equal length, so that a share has tiles of
    few segments, mostly of one. Segment `i` of share `s` has the place `s + i` for its part: where a share ends the
    next goes on, so no two have the same.
    """
    length = tl.full([], 0, tl.int64)
    for i in tl.static_range(FIRST):
        size = tokens_of(sizes, columns, totals, done, tail, i, len(TILES), COUNTED)
        length += tl.cdiv(size, TILES[i]) * TIMES[i]
    return length


@triton.jit
def first_tile(at, before, tiles, TIME: tl.constexpr):
    """The first of a segment's `tiles` that begins no earlier than `at` in the row; `before` of it are of others."""
    return tl.cdiv(tl.minimum(tl.maximum(at - before, 0), tiles.to(tl.int64) * TIME).to(tl.int32), TIME)


@triton.jit
def refused(counts, COUNTED: tl.constexpr):
    """Whether the layer was full when a token came."""
    return tl.load(counts + COUNTED[2]) != 0
