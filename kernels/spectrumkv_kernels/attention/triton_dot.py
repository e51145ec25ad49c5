"""Products in Triton kernels: sizes of blocks, and codes as operands."""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
PACKED = tl.constexpr(not triton.knobs.runtime.interpret)
"""In assembly are done what the compiler has no operation for; the interpreter lacks assembly."""
SUBNORMAL = tl.constexpr(2.0**24)
"""An integer n in the low bits of a float16 is the subnormal number n * 2**-24."""


@triton.constexpr_function
def pad(n):
    """Size of a block that holds `n` and that `tl.dot` takes."""
    return max(16, triton.next_power_of_2(n))


@triton.jit
def dot(a, b, acc):
    """`acc + a @ b` in float32."""
    if not PACKED:  # the interpreter multiplies the bit patterns of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def log2(x):
    """The binary logarithm to an absolute error of 2**-22: one operation, where `tl.log2` calls a function of 40."""
    if PACKED:
        return tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def plane(words, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """One code of every 16-bit word, as the subnormal float16 with its bits: two bit operations a pair."""
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
def plane_of_three(upper, lowest, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """As `plane`, for codes of 3 bits: what is shared by planes, shifts, and two bit operations a pair.

    Args:
        upper: Words of their upper two bits, side by side.
        lowest: Words in which the lowest bit stands where `upper` has the lower one of the two.
        MASK: That one bit.
    """
    if PACKED:
        UP: tl.constexpr = f"shr.b32 t, $1, {SHIFT - 1};" if SHIFT else "shl.b32 t, $1, 1;"
        return tl.inline_asm_elementwise(
            f"""{{
                .reg .b32 t, u;
                {UP}
                shr.b32 u, $2, {SHIFT};
                and.b32 t, t, {6 * MASK * 0x10001};
                lop3.b32 $0, u, {MASK * 0x10001}, t, 0xEA;
            }}""",
            "=r,r,r", [upper, lowest], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    codes = ((upper >> SHIFT) & (3 * MASK)) << 1 | ((lowest >> SHIFT) & MASK)
    return codes.to(tl.float16, bitcast=True)


@triton.jit
def shifted(words, which):
    """Words shifted down by a bit where `which` is -1, as they are where it is 0, two at a time: what is carried from
    word to word is to be masked out.
    """
    if PACKED:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 s; shr.b32 s, $1, 1; lop3.b32 $0, s, $1, $2, 0xE4; }", "=r,r,r", [words, which],
            dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    return tl.where(which != 0, words >> 1, words)
