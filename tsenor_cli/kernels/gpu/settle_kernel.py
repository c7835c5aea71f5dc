"""The second kernel of the exact solver: the blocks that the first leaves open, in int64 and exactly as w is defined.

Most of them are only tied, and their mask is right already: prices are looked for that prove it (kernels/settle.py).
Where there are none, rows take their best, and paths balance the columns. Whatever mask and prices it starts from, it
ends with the best mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tsenor_cli.kernels.gpu.draft_kernel import Q_BITS as DRAFT_BITS
from tsenor_cli.kernels.gpu.integers import exponent_of, power, scaled
from tsenor_cli.kernels.gpu.paths import balance, swap, wrong_counts
from tsenor_cli.kernels.gpu.rows import write
from tsenor_cli.kernels.gpu.scores import read_again
from tsenor_cli.kernels.gpu.tile import (
    block_max,
    block_sum,
    column_max,
    column_min,
    column_sum,
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

NUMBERS = ["waiting", "per_row", "stride", "n", "most"]
POINTERS = ["scores", "ties", "queue", "mask", "prices", "objective", "excess", "status", "duals"]


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def settle(
    scores,
    ties,
    queue,
    mask,
    prices,
    objective,
    excess,
    status,
    duals,
    waiting,
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
    """Solve the `waiting` blocks whose numbers are in queue, int64.

    objective and excess float64 [waiting]; status int32 [waiting] becomes 1 where paths were needed, -1 where `most`
    sweeps were not enough. The others are as in draft_kernel.py.
    """
    SIDE: tl.constexpr = RI * RO
    row, column = rows_of(L, RI, RO, CO), columns_of(L, CI, CO)
    lane = tl.arange(0, L)[:, None, None]
    place = tl.program_id(0) * (L // (RO * CO)) + lane // (RO * CO)
    real = place < waiting
    block = tl.load(queue + tl.max_contiguous(place, (L, 1, 1)), mask=real, other=0)
    inside = real & (row < M) & (column < M)
    line = ((block // per_row) * M + row) * stride
    offset = tl.max_contiguous(line + (block % per_row) * M + column, (L, 1, 1))
    x = read_again(scores, offset, inside)
    terms = tl.load(ties + tl.max_contiguous(row * SIDE + column, (L, 1, 1))).to(tl.int64)
    exponent = exponent_of(block_max(x, RO, CO))
    w = scaled(x, -exponent + SCORE_BITS) + terms
    kept = tl.load(mask + offset, mask=inside, other=0) > 0
    in_rows = (row_sum(kept.to(tl.int32), RO, CO) != tl.where(row < M, n, 0)).to(tl.int32)
    sound = real & (column_max(in_rows, RO, CO) == 0)  # always, unless there are scores that int32 cannot stand
    kept = tl.where(sound, kept, (row < M) & (column < M) & ((row + column) % M < n))
    z = w + tl.where(kept, 0, APART)
    start = (
        tl.load(prices + tl.max_contiguous(block * SIDE + column, (L, 1, 1)), mask=real, other=0).to(tl.int64) << FINER
    )
    if M < SIDE:
        start = tl.where(column < M, start, OUTSIDE)
    u, v, unproven = price(z, start, real, RO, CO)
    v = tl.where(unproven > 0, start, v)
    z = swap(z, v, row, column, unproven, APART, RO, CO)
    u = tl.where(unproven > 0, row_max(z - v, RO, CO) - APART, u)
    over = column_sum((z < FAR).to(tl.int32), RO, CO) - tl.where(column < M, n, 0)
    repaired = row_max(over, RO, CO) > 0
    z, _, u, v, _ = balance(z, over, u, v, row, column, most, APART, FAR, RO, CO)
    kept = z < FAR
    write(mask, kept, offset, inside, False)
    x = read_again(scores, offset, inside)
    total = block_sum(tl.where(kept, x, 0.0), RO, CO)
    # The certificate is that of the scores. Where tie terms are seen in it, prices are looked for without them.
    z -= terms
    unit = tl.where(block_max(x, RO, CO) > 0.0, power(exponent - SCORE_BITS), 0.0)
    surplus = surplus_of(z, u, v, inside, APART, RO, CO) * unit
    noticed = real & (surplus > total * NOTICEABLE)
    free_u, free_v, tied = price(z, v, noticed, RO, CO)
    better = noticed & (tied == 0)
    u, v = tl.where(better, free_u, u), tl.where(better, free_v, v)
    surplus = tl.where(better, 0.0, surplus)
    tl.store(objective + place, total, mask=real)
    tl.store(excess + place, surplus, mask=real)
    failed = wrong_counts(kept, row, column, n, M, RO, CO) > 0
    tl.store(status + place, tl.where(failed, -1, repaired.to(tl.int32)), mask=real)
    if DUALS:
        target = block * (2 * M)
        tl.store(duals + tl.max_contiguous(target + row, (L, 1, 1)), u.to(tl.float64) * unit, mask=real & (row < M))
        tl.store(
            duals + tl.max_contiguous(target + M + column, (L, 1, 1)), v.to(tl.float64) * unit, mask=real & (column < M)
        )


@triton.jit
def surplus_of(z, u, v, inside, APART: tl.constexpr, RO: tl.constexpr, CO: tl.constexpr):
    """Dual value - primal value of the blocks (docs/mathematics.md, eq. 4), float64 [L, 1, 1]."""
    kept = z < FAR
    reduced = z - tl.where(kept, 0, APART) - u - v
    return block_sum(tl.where(inside, tl.maximum(tl.where(kept, -reduced, reduced), 0), 0), RO, CO).to(tl.float64)


@triton.jit
def price(z, v, real, RO: tl.constexpr, CO: tl.constexpr):
    """Find duals for which the mask is best among those with its row and column counts; where there are such.

    Every u as small as its row allows, then every v lowered as far as its column asks, again and again: the method of
    Bellman and Ford. From prices that are nearly right it settles in a few sweeps. Returns u, v, and what did not.
    """
    u = row_max(z - v, RO, CO) - APART
    moving = tl.where(real, 1, 0)
    sweep = 0
    while (largest_of_all(moving) > 0) & (sweep < SWEEPS):
        least = column_min(z - u, RO, CO)
        lower = least < v
        v = tl.minimum(v, least)
        u = row_max(z - v, RO, CO) - APART
        moving = row_max(lower.to(tl.int32), RO, CO)
        sweep += 1
    return u, v, moving
