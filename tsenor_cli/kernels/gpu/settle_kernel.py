"""The other kernels of the exact solver: the blocks that the first leaves open, in int64 and exactly as w is defined.

Most of them are only tied, and their mask is right already: prices are looked for that prove it (kernels/settle.py).
Where there are none, rows take their best. Then paths balance the columns. Whatever mask and prices this starts from,
it ends with the best mask. It is two kernels, as Triton 3.6 cannot compile them as one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tsenor_cli.kernels.gpu.draft_kernel import Q_BITS as DRAFT_BITS
from tsenor_cli.kernels.gpu.integers import exponent_of, power, scaled
from tsenor_cli.kernels.gpu.paths import balance, swap, too_full, wrong_counts
from tsenor_cli.kernels.gpu.rows import write
from tsenor_cli.kernels.gpu.scores import read_again
from tsenor_cli.kernels.gpu.tile import (
    block_max,
    block_sum,
    blocks_of,
    column_max,
    column_min,
    columns_of,
    largest_of_all,
    row_max,
    row_sum,
    rows_of,
)
from tsenor_cli.kernels.ties import SCORE_BITS as BITS

SCORE_BITS, FINER = tl.constexpr(BITS), tl.constexpr(BITS - DRAFT_BITS)
APART, FAR = tl.constexpr(1 << 62), tl.constexpr(1 << 60)  # see paths.py
OUTSIDE = tl.constexpr(1 << 58)  # the price of what is no column
SWEEPS = tl.constexpr(12)  # of `price`: enough where it can succeed at all
NOTICEABLE = tl.constexpr(1e-9)  # a gap that is worth the search for better duals

NOBODY = tl.constexpr(-1)  # in the queue, from where it ends on

# What is written of each block, float64 [places, STATISTICS].
EXCESS, GAP, REPAIRED, FAILED = (tl.constexpr(k) for k in range(4))
STATISTICS = tl.constexpr(4)

NUMBERS = ["places", "per_row", "stride", "n", "most"]
POINTERS = ["scores", "ties", "queue", "mask", "exact_prices", "objective", "statistics", "duals"]
FIRST_NUMBERS = NUMBERS[:-1]
FIRST_POINTERS = ["scores", "ties", "queue", "mask", "prices", "exact_prices"]


@triton.jit(do_not_specialize=FIRST_NUMBERS, do_not_specialize_on_alignment=FIRST_POINTERS)
def arrange(
    scores,
    ties,
    queue,
    mask,
    prices,
    exact_prices,
    places,
    per_row,
    stride,
    n,
    M: tl.constexpr,
    RI: tl.constexpr,
    CI: tl.constexpr,
    RO: tl.constexpr,
    CO: tl.constexpr,
    L: tl.constexpr,
):
    """Make the masks of the blocks whose numbers are in queue, int64 [places], the best of their counts.

    exact_prices int64 [places, SIDE] gets prices of the columns that prove it. For the others see draft_kernel.py.
    """
    SIDE: tl.constexpr = RI * RO
    if tl.load(queue + tl.program_id(0) * (L // (RO * CO))) == NOBODY:
        return
    row, column, place = rows_of(L, RI, RO, CO), columns_of(L, CI, CO), blocks_of(L, RO, CO)
    block, real = taken_from(queue, place, places, L)
    inside = real & (row < M) & (column < M)
    offset = place_of(block, per_row, stride, row, column, M, L)
    w, _, _ = integers_of(scores, ties, offset, inside, row * SIDE + column, RO, CO)
    kept = tl.load(mask + offset, mask=inside, other=0) > 0
    in_rows = (row_sum(kept.to(tl.int32), RO, CO) != tl.where(row < M, n, 0)).to(tl.int32)
    sound = real & (column_max(in_rows, RO, CO) == 0)  # always, unless there are scores that int32 cannot stand
    kept = tl.where(sound, kept, (row < M) & (column < M) & ((row + column) % M < n))
    z = w + tl.where(kept, 0, APART)
    start = tl.load(prices + tl.max_contiguous(block * SIDE + column, (L, 1, 1)), mask=real, other=0)
    start = start.to(tl.int64) << FINER
    if M < SIDE:
        start = tl.where(column < M, start, OUTSIDE)
    v, unproven = price(z, start, real, APART, RO, CO)
    v = tl.where(unproven > 0, start, v)
    z = swap(z, v, row, column, unproven, APART, RO, CO)
    write(mask, z < FAR, offset, inside, False)
    tl.store(exact_prices + tl.max_contiguous(place * SIDE + column, (L, 1, 1)), v, mask=real)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def settle(
    scores,
    ties,
    queue,
    mask,
    exact_prices,
    objective,
    statistics,
    duals,
    places,
    per_row,
    stride,
    n,
    most,
    M: tl.constexpr,
    RI: tl.constexpr,
    CI: tl.constexpr,
    RO: tl.constexpr,
    CO: tl.constexpr,
    L: tl.constexpr,
    DUALS: tl.constexpr,
):
    """Balance the columns of what `arrange` has left, and certify it.

    objective float64 [blocks]; statistics float64 [places, STATISTICS]: REPAIRED where paths were needed, FAILED where
    `most` sweeps were not enough.
    """
    SIDE: tl.constexpr = RI * RO
    if tl.load(queue + tl.program_id(0) * (L // (RO * CO))) == NOBODY:
        return
    row, column, place = rows_of(L, RI, RO, CO), columns_of(L, CI, CO), blocks_of(L, RO, CO)
    block, real = taken_from(queue, place, places, L)
    inside = real & (row < M) & (column < M)
    offset = place_of(block, per_row, stride, row, column, M, L)
    w, terms, unit = integers_of(scores, ties, offset, inside, row * SIDE + column, RO, CO)
    z = w + tl.where(tl.load(mask + offset, mask=inside, other=0) > 0, 0, APART)
    v = tl.load(exact_prices + tl.max_contiguous(place * SIDE + column, (L, 1, 1)), mask=real, other=0)
    allowed = tl.where(real, 1, 0)
    repaired = row_max(too_full(z < FAR, column, n, allowed, M, RO, CO), RO, CO) > 0
    z, v = balance(z, v, row, column, n, allowed, most, M, APART, FAR, RO, CO)
    kept = z < FAR
    write(mask, kept, offset, inside, False)
    x = read_again(scores, offset, inside)
    total = block_sum(tl.where(kept, x, 0.0), RO, CO)
    # The certificate is that of the scores. Where tie terms are seen in it, prices are looked for without them.
    z -= terms
    u = row_max(z + terms - v, RO, CO) - APART
    surplus = surplus_of(z, u, v, inside, RO, CO) * unit
    noticed = real & (surplus > total * NOTICEABLE)
    free_v, tied = price(z, v, noticed, APART, RO, CO)
    better = noticed & (tied == 0)
    v = tl.where(better, free_v, v)
    u = tl.where(better, row_max(z - v, RO, CO) - APART, u)
    surplus = tl.where(better, 0.0, surplus)
    failed = wrong_counts(kept, row, column, n, M, RO, CO) > 0
    here = statistics + place * STATISTICS
    tl.store(objective + block, total, mask=real)
    tl.store(here + EXCESS, surplus, mask=real)
    tl.store(here + GAP, surplus / tl.where(surplus > 0.0, total + surplus, 1.0), mask=real)
    tl.store(here + REPAIRED, repaired.to(tl.float64), mask=real)
    tl.store(here + FAILED, failed.to(tl.float64), mask=real)
    if DUALS:
        of_rows = tl.max_contiguous(block * (2 * M) + row, (L, 1, 1))
        of_columns = tl.max_contiguous(block * (2 * M) + M + column, (L, 1, 1))
        tl.store(duals + of_rows, u.to(tl.float64) * unit, mask=real & (row < M))
        tl.store(duals + of_columns, v.to(tl.float64) * unit, mask=real & (column < M))


@triton.jit
def taken_from(queue, place, places, L: tl.constexpr):
    """The blocks that wait at some places of the queue, and where one does."""
    block = tl.load(queue + tl.max_contiguous(place, (L, 1, 1)), mask=place < places, other=NOBODY)
    real = block != NOBODY
    return tl.where(real, block, 0), real


@triton.jit
def place_of(block, per_row, stride, row, column, M: tl.constexpr, L: tl.constexpr):
    """Where the entries of any blocks stand in their matrix; see offsets_of for the hint."""
    line = ((block // per_row) * M + row) * stride
    return tl.max_contiguous(line + (block % per_row) * M + column, (L, 1, 1))


@triton.jit
def integers_of(scores, ties, offset, inside, entry, RO: tl.constexpr, CO: tl.constexpr):
    """Return w and its tie terms int64 [L, RI, CI], and the unit of w, float64 [L, 1, 1], 0 for zeros."""
    x = read_again(scores, offset, inside)
    terms = tl.load(ties + tl.max_contiguous(entry, (offset.shape[0], 1, 1))).to(tl.int64)
    largest = block_max(x, RO, CO)
    exponent = exponent_of(largest)
    w = scaled(x, -exponent + SCORE_BITS) + terms
    return w, terms, tl.where(largest > 0.0, power(exponent - SCORE_BITS), 0.0)


@triton.jit
def surplus_of(z, u, v, inside, RO: tl.constexpr, CO: tl.constexpr):
    """Dual value - primal value of the blocks (docs/mathematics.md, eq. 4), float64 [L, 1, 1]."""
    kept = z < FAR
    reduced = z - tl.where(kept, 0, APART) - u - v
    return block_sum(tl.where(inside, tl.maximum(tl.where(kept, -reduced, reduced), 0), 0), RO, CO).to(tl.float64)


@triton.jit
def price(z, v, real, APART: tl.constexpr, RO: tl.constexpr, CO: tl.constexpr):
    """Find duals for which the mask is best among those with its row and column counts; where there are such.

    Every u as small as its row allows, then every v lowered as far as its column asks, again and again: the method of
    Bellman and Ford. From prices that are nearly right it settles in a few sweeps. Returns v, and where it did not.
    """
    allowed = tl.where(real, 1, 0)
    moving = allowed
    sweep = 0
    going = largest_of_all(allowed)
    while going > 0:
        least = column_min(z - (row_max(z - v, RO, CO) - APART), RO, CO)
        moving = tl.where(allowed > 0, row_max((least < v).to(tl.int32), RO, CO), 0)
        v = tl.minimum(v, least)
        sweep += 1
        going = tl.where(sweep < SWEEPS, largest_of_all(moving), 0)
    return v, moving
