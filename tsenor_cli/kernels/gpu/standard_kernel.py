"""The standard N:M mask as one kernel: the n largest of every m consecutive scores, each read once and side by side.

The best of a group is taken n times; or the worst is given up m - n times, if that is less. Scores are compared by
their bits, which order like the numbers, as none is negative; of equal ones the lower index is better.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tsenor_cli.kernels.gpu.scores import is_usable, widened
from tsenor_cli.kernels.gpu.variant import Variant

# What a program writes, float64 [programs, STATISTICS].
OBJECTIVE, UNUSABLE = tl.constexpr(0), tl.constexpr(1)
STATISTICS = tl.constexpr(2)
TAKEN, OUTSIDE = tl.constexpr(-1), tl.constexpr(-2)  # instead of a score
SCORES_PER_PROGRAM = 4096
WARPS = 4  # 32 scores of each thread: enough loads under way


@triton.jit(do_not_specialize=["groups", "rounds", "drop"])
def standard(
    scores,
    mask,
    statistics,
    groups,
    rounds,
    drop,
    M: tl.constexpr,
    SIDE: tl.constexpr,
    G: tl.constexpr,
    ABSOLUTE: tl.constexpr,
):
    """Choose `rounds` of every M scores: the best, which are kept, or, if `drop`, the worst, which are not.

    A program has G groups, in a tile [G, SIDE] with SIDE the least power of two ≥ M.
    """
    j = tl.arange(0, SIDE)[None, :]
    group = tl.program_id(0) * G + tl.arange(0, G)[:, None]
    inside = (group < groups) & (j < M)
    # As one line where there is no padding: only then a thread loads 16 bytes of several groups at once.
    line = tl.program_id(0).to(tl.int64) * (G * M) + tl.arange(0, G * SIDE)
    place = tl.program_id(0).to(tl.int64) * (G * M) + (tl.arange(0, G)[:, None] * M + j)
    if M == SIDE:
        x = tl.reshape(tl.load(scores + line, mask=line < groups.to(tl.int64) * M, other=0.0), (G, SIDE))
    else:
        x = tl.load(scores + place, mask=inside, other=0.0)
    wide = widened(x)
    usable = is_usable(wide, ABSOLUTE)
    chosen = choose(x, inside, j, rounds, drop)
    kept = inside & (chosen != (drop > 0))
    if M == SIDE:
        tl.store(mask + line, tl.reshape(kept.to(tl.uint8), (G * SIDE,)), mask=line < groups.to(tl.int64) * M)
    else:
        tl.store(mask + place, kept.to(tl.uint8), mask=inside)
    value = tl.where(kept & usable, tl.abs(wide), 0.0).to(tl.float64)
    here = statistics + tl.program_id(0) * STATISTICS
    tl.store(here + OBJECTIVE, tl.sum(tl.sum(value, axis=1), axis=0))
    tl.store(here + UNUSABLE, tl.max(tl.max((~usable).to(tl.int32), axis=1), axis=0).to(tl.float64))


@triton.jit
def choose(x, inside, j, rounds, drop):
    """The `rounds` best of every row of x [G, SIDE], or, if `drop`, the worst; bool [G, SIDE]."""
    SIDE: tl.constexpr = x.shape[1]
    j = tl.where(drop > 0, SIDE - 1 - j, j)  # of equal ones the last is worse
    if x.dtype.primitive_bitwidth == 16:
        # The index fits into the same word: every key is there once.
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
        key = tl.where(drop > 0, 0x7FFF - bits, bits) * SIDE + (SIDE - 1 - j)
        key = tl.where(inside, key, OUTSIDE)
        while rounds > 0:
            key = tl.where(key == tl.max(key, axis=1, keep_dims=True), TAKEN, key)
            rounds -= 1
    else:
        if x.dtype == tl.float64:
            bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
            key = tl.where(drop > 0, 0x7FFFFFFFFFFFFFFF - bits, bits)
        else:
            bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            key = tl.where(drop > 0, 0x7FFFFFFF - bits, bits)
        key = tl.where(inside, key, OUTSIDE)
        while rounds > 0:
            best = key == tl.max(key, axis=1, keep_dims=True)
            key = tl.where(j == tl.min(tl.where(best, j, SIDE), axis=1, keep_dims=True), TAKEN, key)
            rounds -= 1
    return key == TAKEN


def variants(m: int, n: int, dtype: str, warp_size: int = 32, *, absolute: bool = True) -> list[Variant]:
    """The one kernel for groups of m of `dtype`; any n, any warp."""
    del n, warp_size
    side = 1 << (m - 1).bit_length()
    signature = {"scores": f"*{dtype}", "mask": "*u8", "statistics": "*fp64"}
    signature |= dict.fromkeys(("groups", "rounds", "drop"), "i32")
    constants = {"M": m, "SIDE": side, "G": SCORES_PER_PROGRAM // side, "ABSOLUTE": absolute}
    return [Variant("standard", standard, signature, constants, WARPS, ("scores", "mask", "statistics"))]
