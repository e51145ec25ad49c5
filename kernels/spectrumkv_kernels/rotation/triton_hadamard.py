"""The Hadamard transform inside Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def join_quarters(y0, y1, y2, y3):
    """`[tokens, channels]` from its quarters. A thread holds the same channels of each: the butterflies of these two
    bits, and packing, stay inside it."""
    y = tl.join(tl.join(y0, y2), tl.join(y1, y3))  # [tokens, channels, high bit, low bit]
    return tl.reshape(tl.permute(y, (0, 2, 3, 1)), [y0.shape[0], 4 * y0.shape[1]])


@triton.jit
def hadamard(x, BLOCK: tl.constexpr):
    """Hadamard transform, not normalised, of float32 `[tokens, channels]` in blocks of `BLOCK` channels.

    A butterfly is a sum over an axis of 2, and `a - b = (a + b) - 2b`: registers and warp shuffles, no shared memory.
    """
    PAIRS: tl.constexpr = x.numel // 2
    y = x
    second = (tl.arange(0, 2) == 1)[None, :, None]
    for stage in tl.static_range(BLOCK.bit_length() - 1):
        pairs = tl.reshape(y, [PAIRS >> stage, 2, 1 << stage])  # channels that are `1 << stage` apart, side by side
        total = tl.sum(pairs, 1, keep_dims=True)
        y = tl.where(second, total - 2 * pairs, total)
    return tl.reshape(y, x.shape)
