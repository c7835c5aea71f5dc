"""Reading the blocks of a tile, scaled by a power of two so that nothing later overflows or vanishes."""

from __future__ import annotations

import triton
import triton.language as tl

from tsenor_cli.kernels.gpu.tile import block_max

TINY, HUGE, SHIFT = tl.constexpr(2.0**-60), tl.constexpr(2.0**60), tl.constexpr(2.0**64)


@triton.jit
def widened(x):
    """Return x in float32, or as it is if it is float64.

    bfloat16 by its bits: that is what it means everywhere, and Triton's interpreter does not know its denormals.
    """
    if x.dtype == tl.float64:
        return x
    elif x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def is_usable(x, ABSOLUTE: tl.constexpr):
    """Is a score, widened, finite, and, unless ABSOLUTE, at least 0?"""
    return ((tl.abs(x) if ABSOLUTE else x) >= 0.0) & (tl.abs(x) < float("inf"))


@triton.jit
def read(scores, offset, inside, ABSOLUTE: tl.constexpr, RO: tl.constexpr, CO: tl.constexpr):
    """Return w [L, RI, CI] float32 with the largest of each block in [0.5, 1), 0 where not `inside`.

    And float64 [L, 1, 1], powers of two: w / score and score / w; the latter is 0 for a block of zeros. And int32
    [L, RI, CI]: is the score negative (unless ABSOLUTE), infinite or not a number? Those are read as 0.
    """
    x = widened(tl.load(scores + offset, mask=inside, other=0.0))
    usable = is_usable(x, ABSOLUTE)
    x = tl.where(usable, tl.abs(x), 0.0)
    largest = block_max(x, RO, CO)
    if x.dtype == tl.float64:
        # At both ends of float64 the largest may end in [1, 4), or below 0.5 if it is denormal.
        exponent = tl.minimum(tl.maximum(largest.to(tl.int64, bitcast=True) >> 52, 1), 2044)
        up = ((2045 - exponent) << 52).to(tl.float64, bitcast=True)
        down = ((exponent + 1) << 52).to(tl.float64, bitcast=True)
        w = (x * up).to(tl.float32)
    else:
        # In two steps: 2^149, for the smallest denormal, is no float32.
        first = tl.where(largest < TINY, SHIFT, tl.where(largest > HUGE, 1.0 / SHIFT, 1.0))
        undo = tl.where(largest < TINY, 1.0 / SHIFT, tl.where(largest > HUGE, SHIFT, 1.0))
        exponent = (largest * first).to(tl.int32, bitcast=True) >> 23
        second = ((253 - exponent) << 23).to(tl.float32, bitcast=True)
        up = first.to(tl.float64) * second.to(tl.float64)
        down = ((exponent + 1) << 23).to(tl.float32, bitcast=True).to(tl.float64) * undo.to(tl.float64)
        w = x * first * second
    return w, up, tl.where(largest > 0.0, down, 0.0), (~usable).to(tl.int32)


@triton.jit
def read_again(scores, offset, inside):
    """The absolute scores in float64, 0 where not finite. They are in the cache; to keep them would cost registers."""
    x = tl.abs(widened(tl.load(scores + offset, mask=inside, other=0.0)))
    return tl.where(x < float("inf"), x, 0.0).to(tl.float64)
