"""Algorithm 1 of the TSENOR paper (arXiv 2505.23949) on the blocks of a tile: kernels/dykstra.py for a GPU.

P = 2^(t w + U + V), and S = min(P, 1). Within a stage, one τ, P is without the row factors: S = min(P, inverse) * a,
with inverse = 1 / a. So an entry costs four operations an iteration: minimum, sum of the row, sum of the column, factor
of the column. n / x is n rsqrt(x)², one special instruction where a division takes several.

A block that is done waits for the others of its program. Only vectors say where it stands, so only they are held
fast; its P goes on and is not looked at.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tsenor_cli.kernels import schedule
from tsenor_cli.kernels.gpu.tile import (
    block_max,
    block_sum,
    column_sum,
    lanes_of_columns_sum,
    lanes_of_rows_sum,
    largest_of_all,
    row_max,
    row_sum,
)

PER_STAGE = tl.constexpr(schedule.PER_STAGE)
RESIDUAL_GOAL = tl.constexpr(schedule.RESIDUAL_GOAL)
GAP_GOAL = tl.constexpr(schedule.GAP_GOAL)
LOG2_E = tl.constexpr(schedule.LOG2_E)
HIGHEST = tl.constexpr(60.0)  # log2 of an entry of P, far above every S, far below what overflows
LEAST, MOST = tl.constexpr(1e-37), tl.constexpr(1e37)  # of a column's factor in a stage, so that V stays finite


@triton.jit
def dykstra(w, row, column, n, first, last, fixed, most, M: tl.constexpr, RO: tl.constexpr, CO: tl.constexpr):
    """Find potentials for w [L, RI, CI] float32; all the rest as in kernels/dykstra.py.

    τ goes from `first` to `last` times the largest score. `fixed` is 1 where `last` was asked for. Returns U, V, t, the
    iterations (int32 [L, 1, 1]), and whether the goal was missed (int32).
    """
    largest = block_max(w, RO, CO)
    t = first * LOG2_E / tl.where(largest > 0.0, largest, 1.0)
    u = -t * row_max(w, RO, CO)
    v = tl.sum(w, axis=1, keep_dims=True) * 0.0
    iterations = tl.zeros_like(t).to(tl.int32)
    active = iterations + 1
    missed = active
    gap = t * 0.0 + 1.0
    residual = gap
    reached = first
    going = 1
    while going > 0:
        per_stage = tl.where((fixed > 0) & (reached >= last), most, PER_STAGE)
        u, v, iterations, residual = stage(
            w, row, column, u, v, t, n, active, iterations, residual, per_stage, most, M, RO, CO
        )
        gap = tl.where(active > 0, gap_of(w, row, column, u, v, t, n, M, RO, CO), gap)
        within = (iterations < most).to(tl.int32)
        late = (residual > n * RESIDUAL_GOAL).to(tl.int32)
        wide = (gap > GAP_GOAL).to(tl.int32)
        missed = tl.where(fixed > 0, late, wide)
        active = within * tl.where(fixed > 0, 1, active * wide)
        going = tl.where(reached >= last, 0, largest_of_all(active))
        factor = tl.where((active > 0) & (going > 0), 2.0, 1.0)
        t, u, v = t * factor, u * factor, v * factor
        reached *= 2.0
    return u, v, t, iterations, missed


@triton.jit
def stage(
    w,
    row,
    column,
    u,
    v,
    t,
    n,
    active,
    iterations,
    residual,
    per_stage,
    most,
    M: tl.constexpr,
    RO: tl.constexpr,
    CO: tl.constexpr,
):
    """Iterate at one τ, and take the factors into the potentials."""
    wanted = n.to(tl.float32)
    share, goal = 1.0 / wanted, wanted * RESIDUAL_GOAL
    p = tl.exp2(tl.minimum(w * t + u + v, HIGHEST))
    if M < CO * w.shape[2]:
        p = tl.where((row < M) & (column < M), p, 0.0)
    inverse = u * 0.0 + 1.0
    a = inverse
    factor = v * 0.0 + 1.0
    moving = tl.where(iterations < most, active, 0)
    step = 0
    while largest_of_all(moving) > 0:
        s = tl.minimum(p, inverse)
        total = row_sum(s, RO, CO)
        if M < CO * w.shape[2]:
            total = tl.where(row < M, total, wanted)
        off_rows = tl.abs(total * a - wanted)
        root = tl.rsqrt(total)
        a = tl.where(moving > 0, root * root * wanted, a)
        inverse = tl.where(moving > 0, total * share, inverse)
        total = column_sum(s * a, RO, CO)
        if M < CO * w.shape[2]:
            total = tl.where(column < M, total, wanted)
        off = tl.maximum(
            tl.max(off_rows, axis=1, keep_dims=True), tl.max(tl.abs(total - wanted), axis=2, keep_dims=True)
        )
        root = tl.rsqrt(total)
        q = tl.where(moving > 0, root * root * wanted, 1.0)
        p *= q
        factor *= q
        step += 1
        residual = tl.where(moving > 0, block_max(off, RO, CO), residual)
        iterations += moving
        moving = tl.where((residual > goal) & (iterations < most) & (step < per_stage), moving, 0)
    u -= tl.where(active > 0, tl.log2(inverse), 0.0)
    v += tl.where(active > 0, tl.log2(tl.minimum(tl.maximum(factor, LEAST), MOST)), 0.0)
    return u, v, iterations, residual


@triton.jit
def gap_of(w, row, column, u, v, t, n, M: tl.constexpr, RO: tl.constexpr, CO: tl.constexpr):
    """(bound - value of S) / bound, [L, 1, 1]."""
    power = w * t + u + v
    if M < CO * w.shape[2]:
        power = tl.where((row < M) & (column < M), power, 0.0)
    score = w * t
    value = block_sum(score * tl.exp2(tl.minimum(power, 0.0)), RO, CO)
    over = block_sum(tl.maximum(power, 0.0), RO, CO)
    of_rows = lanes_of_columns_sum(tl.sum(u, axis=1, keep_dims=True), RO, CO)
    of_columns = lanes_of_rows_sum(tl.sum(v, axis=2, keep_dims=True), RO, CO)
    bound = over - n * (of_rows + of_columns)
    return tl.abs(bound - value) / tl.maximum(bound, 1e-30)
