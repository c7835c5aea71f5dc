"""Blocks of 4 exactly, without a loop: there are only 24 or 90 masks, and half of a block decides the other's columns.

A lane has a block, as 16 numbers. Of two rows a, b that keep n columns each, only how often a column is kept matters to
the other two, c and d. Equal counts form a class; within a class each half takes its own best way, and the best sum of
two halves wins. All in int64 with the tie terms, so the mask is that of every other exact solver.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tsenor_cli.kernels.gpu.integers import exponent_of, power, scaled
from tsenor_cli.kernels.gpu.scores import is_usable, widened
from tsenor_cli.kernels.ties import SCORE_BITS as BITS

SCORE_BITS = tl.constexpr(BITS)
# What a program writes, float64 [programs, STATISTICS].
OBJECTIVE, EXCESS, WORST_GAP, UNUSABLE = (tl.constexpr(k) for k in range(4))
STATISTICS = tl.constexpr(4)
SPREAD, BYTES = tl.constexpr(0x00204081), tl.constexpr(0x01010101)  # 4 bits times SPREAD have each bit in its own byte

NUMBERS = ["blocks", "per_row", "stride"]
POINTERS = ["scores", "ties", "mask", "statistics"]


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def four(
    scores, ties, mask, statistics, blocks, per_row, stride, N: tl.constexpr, L: tl.constexpr, ABSOLUTE: tl.constexpr
):
    """Solve this program's L blocks. ties is int32 [4, 4]; mask points to int32, the four bytes of a row of a block."""
    block = tl.program_id(0) * L + tl.arange(0, L)
    real = block < blocks
    corner = (block // per_row).to(tl.int64) * 4 * stride + (block % per_row) * 4
    x0, usable0 = load_row(scores + corner, real, ABSOLUTE)
    x1, usable1 = load_row(scores + corner + stride, real, ABSOLUTE)
    x2, usable2 = load_row(scores + corner + 2 * stride, real, ABSOLUTE)
    x3, usable3 = load_row(scores + corner + 3 * stride, real, ABSOLUTE)
    largest = tl.maximum(tl.maximum(largest_of(x0), largest_of(x1)), tl.maximum(largest_of(x2), largest_of(x3)))
    exponent = exponent_of(largest)
    shift = -exponent + SCORE_BITS
    s0, s1, s2, s3 = integers(x0, shift), integers(x1, shift), integers(x2, shift), integers(x3, shift)
    w0, w1 = with_ties(s0, ties), with_ties(s1, ties + 4)
    w2, w3 = with_ties(s2, ties + 8), with_ties(s3, ties + 12)
    _, bits = best(w0, w1, w2, w3, N)
    bound, _ = best(s0, s1, s2, s3, N)
    if N == 3:
        bound += sum_of(s0) + sum_of(s1) + sum_of(s2) + sum_of(s3)
    reached = kept(s0, bits) + kept(s1, bits >> 4) + kept(s2, bits >> 8) + kept(s3, bits >> 12)
    objective = kept(x0, bits) + kept(x1, bits >> 4) + kept(x2, bits >> 8) + kept(x3, bits >> 12)
    excess = tl.where(largest > 0.0, (bound - reached).to(tl.float64) * power(exponent - SCORE_BITS), 0.0)
    row = corner // 4
    line = stride // 4
    tl.store(mask + row, ((bits & 15) * SPREAD) & BYTES, mask=real)
    tl.store(mask + row + line, (((bits >> 4) & 15) * SPREAD) & BYTES, mask=real)
    tl.store(mask + row + 2 * line, (((bits >> 8) & 15) * SPREAD) & BYTES, mask=real)
    tl.store(mask + row + 3 * line, (((bits >> 12) & 15) * SPREAD) & BYTES, mask=real)
    here = statistics + tl.program_id(0) * STATISTICS
    tl.store(here + OBJECTIVE, tl.sum(objective))
    tl.store(here + EXCESS, tl.sum(excess))
    tl.store(here + WORST_GAP, tl.max(excess / tl.where(excess > 0.0, objective + excess, 1.0)))
    unusable = (~(usable0 & usable1 & usable2 & usable3)).to(tl.int32)
    tl.store(here + UNUSABLE, tl.max(unusable).to(tl.float64))


@triton.jit
def load_row(row, real, ABSOLUTE: tl.constexpr):
    """Four scores of each block in float64, 0 where unusable; and are they all usable?"""
    a, ok_a = load_score(row, real, ABSOLUTE)
    b, ok_b = load_score(row + 1, real, ABSOLUTE)
    c, ok_c = load_score(row + 2, real, ABSOLUTE)
    d, ok_d = load_score(row + 3, real, ABSOLUTE)
    return (a, b, c, d), ok_a & ok_b & ok_c & ok_d


@triton.jit
def load_score(place, real, ABSOLUTE: tl.constexpr):
    x = widened(tl.load(place, mask=real, other=0.0))
    usable = is_usable(x, ABSOLUTE)
    return tl.where(usable, tl.abs(x), 0.0).to(tl.float64), usable


@triton.jit
def largest_of(x):
    return tl.maximum(tl.maximum(x[0], x[1]), tl.maximum(x[2], x[3]))


@triton.jit
def sum_of(x):
    return x[0] + x[1] + x[2] + x[3]


@triton.jit
def integers(x, shift):
    return scaled(x[0], shift), scaled(x[1], shift), scaled(x[2], shift), scaled(x[3], shift)


@triton.jit
def with_ties(s, ties):
    return s[0] + tl.load(ties), s[1] + tl.load(ties + 1), s[2] + tl.load(ties + 2), s[3] + tl.load(ties + 3)


@triton.jit
def kept(x, bits):
    """Σ of the entries of a row whose bits are set."""
    first = tl.where((bits & 1) != 0, x[0], 0) + tl.where((bits & 2) != 0, x[1], 0)
    return first + (tl.where((bits & 4) != 0, x[2], 0) + tl.where((bits & 8) != 0, x[3], 0))


@triton.jit
def negative(x):
    return -x[0], -x[1], -x[2], -x[3]


@triton.jit
def best(a, b, c, d, N: tl.constexpr):
    """The best sum and its mask, 4 bits a row; for N = 3, minus the least sum of what is given up, and its mask."""
    if N == 2:
        return best_of_two(a, b, c, d)
    elif N == 1:
        return best_of_one(a, b, c, d)
    else:
        value, bits = best_of_one(negative(a), negative(b), negative(c), negative(d))
        return value, bits ^ 0xFFFF


@triton.jit
def better(value, bits, other, other_bits):
    more = other > value
    return tl.where(more, other, value), tl.where(more, other_bits, bits)


@triton.jit
def cross(a, b, X: tl.constexpr, Y: tl.constexpr):
    """One of the rows keeps column X, the other Y: the better way."""
    return better(a[X] + b[Y], (1 << X) | (16 << Y), a[Y] + b[X], (1 << Y) | (16 << X))


@triton.jit
def best_of_one(a, b, c, d):
    """One of each row and column: a and b have two columns, c and d the other two."""
    value, bits = halves(a, b, c, d, 0, 1, 2, 3)
    other, other_bits = halves(a, b, c, d, 0, 2, 1, 3)
    value, bits = better(value, bits, other, other_bits)
    other, other_bits = halves(a, b, c, d, 0, 3, 1, 2)
    value, bits = better(value, bits, other, other_bits)
    other, other_bits = halves(a, b, c, d, 1, 2, 0, 3)
    value, bits = better(value, bits, other, other_bits)
    other, other_bits = halves(a, b, c, d, 1, 3, 0, 2)
    value, bits = better(value, bits, other, other_bits)
    other, other_bits = halves(a, b, c, d, 2, 3, 0, 1)
    return better(value, bits, other, other_bits)


@triton.jit
def halves(a, b, c, d, X: tl.constexpr, Y: tl.constexpr, S: tl.constexpr, Z: tl.constexpr):
    """Rows a and b keep X and Y, c and d keep S and Z."""
    upper, upper_bits = cross(a, b, X, Y)
    lower, lower_bits = cross(c, d, S, Z)
    return upper + lower, upper_bits | (lower_bits << 8)


@triton.jit
def best_of_two(a, b, c, d):
    """Two of each row and column, in 19 classes: every column once in a half; or two of them once; or none."""
    upper, upper_bits = all_once(a, b)
    lower, lower_bits = all_once(c, d)
    value, bits = upper + lower, upper_bits | (lower_bits << 8)
    both = a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]
    under = c[0] + d[0], c[1] + d[1], c[2] + d[2], c[3] + d[3]
    value, bits = two_once(value, bits, a, b, c, d, both, under, 0, 1, 2, 3)
    value, bits = two_once(value, bits, a, b, c, d, both, under, 0, 2, 1, 3)
    value, bits = two_once(value, bits, a, b, c, d, both, under, 0, 3, 1, 2)
    value, bits = two_once(value, bits, a, b, c, d, both, under, 1, 2, 0, 3)
    value, bits = two_once(value, bits, a, b, c, d, both, under, 1, 3, 0, 2)
    return two_once(value, bits, a, b, c, d, both, under, 2, 3, 0, 1)


@triton.jit
def all_once(a, b):
    """What one row keeps the other does not."""
    value, bits = opposite(a, b, 0, 1, 2, 3)
    other, other_bits = opposite(a, b, 0, 2, 1, 3)
    value, bits = better(value, bits, other, other_bits)
    other, other_bits = opposite(a, b, 0, 3, 1, 2)
    return better(value, bits, other, other_bits)


@triton.jit
def opposite(a, b, X: tl.constexpr, Y: tl.constexpr, S: tl.constexpr, Z: tl.constexpr):
    """One row keeps X and Y, the other S and Z."""
    xy: tl.constexpr = (1 << X) | (1 << Y)
    sz: tl.constexpr = (1 << S) | (1 << Z)
    return better((a[X] + a[Y]) + (b[S] + b[Z]), xy | (sz << 4), (a[S] + a[Z]) + (b[X] + b[Y]), sz | (xy << 4))


@triton.jit
def two_once(value, bits, a, b, c, d, both, under, X: tl.constexpr, Y: tl.constexpr, S: tl.constexpr, Z: tl.constexpr):
    """The better of what there is and: X and Y once in each half, of S and Z one in a and b, the other in c and d.

    Or X and Y in both of a and b, S and Z in both of c and d.
    """
    upper, upper_bits = cross(a, b, X, Y)
    lower, lower_bits = cross(c, d, X, Y)
    pair, pair_bits = better(both[S] + under[Z], (17 << S) | (4352 << Z), both[Z] + under[S], (17 << Z) | (4352 << S))
    value, bits = better(value, bits, upper + lower + pair, upper_bits | (lower_bits << 8) | pair_bits)
    twice = (both[X] + both[Y]) + (under[S] + under[Z])
    return better(value, bits, twice, (17 << X) | (17 << Y) | (4352 << S) | (4352 << Z))
