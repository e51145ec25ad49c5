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
def tokens_of(totals, done, tail, column, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr):
    """Tokens of a segment: those of an arena once `done` blocks have been tiered, and of the tail, which comes last.

    `column` is that of the arena in the table of totals, as `2n + 3`.
    """
    if SEGMENT == SEGMENTS - 1:
        return tail
    else:
        return tl.load(totals + done * (SEGMENTS - 1) + (column - 3) // 2)


@triton.jit
def chunk_of(size, shares, TILE: tl.constexpr):
    """Tokens that each of the programs reads which share a segment; one tile at least."""
    return tl.maximum(tl.cdiv(size, shares * TILE), 1) * TILE


@triton.jit
def refused(counts, COUNTED: tl.constexpr):
    """Whether the layer was full when a token came."""
    return tl.load(counts + COUNTED[2]) != 0
