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
def refused(counts, COUNTED: tl.constexpr):
    """Whether the layer was full when a token came."""
    return tl.load(counts + COUNTED[2]) != 0
