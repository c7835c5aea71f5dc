"""What the column potentials prove about a mask, docs/mathematics.md, eq. 4, on the blocks of a tile.

Duals are whole multiples of 2^-24 of a block's unit, and small, so that u + v is exact in float64, and w - (u + v) is
rounded once. So no term has the wrong sign, and each is right up to a factor 1 ± 2^-53: the sum, and a little more,
is a bound, and it is 0 where it should be.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tsenor_cli.kernels.gpu.tile import block_sum, largest_of_all, row_max, row_sum

UNITS = tl.constexpr(1 << 24)  # in 1.0 of the scaled scores, which are below 4
DUAL_LIMIT = tl.constexpr(16.0)  # potentials beyond this are cut: any number is a valid dual
ENOUGH = tl.constexpr(16)  # units, in which the dual of a row need not be better
EVER = tl.constexpr(1 << 30)
ROUNDED = tl.constexpr(1.0 + 2.0**-40)  # more than what M² + 1 roundings take away


@triton.jit
def row_duals(z, v, row, column, n, M: tl.constexpr, RO: tl.constexpr, CO: tl.constexpr):
    """For v [L, 1, CI], the n-th largest q - v of every row, all in units and int32: the best dual of that row.

    z is q, or ~q where kept. The n-th lies between the least that is kept and the largest that is not, and there it is
    found by halving.
    """
    x = tl.where(z < 0, ~z, z) - v
    low = -row_max(tl.where(z < 0, -x, -EVER), RO, CO)
    high = tl.where(z < 0, -EVER, x)
    if M < CO * z.shape[2]:
        x = tl.where(column < M, x, -EVER)
        high = tl.where(column < M, high, -EVER)
        low = tl.where(row < M, low, 0)
    high = tl.maximum(low, row_max(high, RO, CO)) + 1
    if M < CO * z.shape[2]:
        high = tl.where(row < M, high, 1)
    while largest_of_all(high - low) > ENOUGH:
        middle = (low + high) >> 1
        enough = row_sum((x >= middle).to(tl.int32), RO, CO) >= n
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def weigh(scores, up, z, duals, inside, RO: tl.constexpr, CO: tl.constexpr):
    """Σ of the kept scores, and (dual value - primal value or a little more) * up: float64 [L, 1, 1].

    `scores` float64 and `duals` u + v int32 are [L, RI, CI]; see `row_duals` for z, and `read` for `up`.
    """
    objective = block_sum(tl.where(z < 0, scores, 0.0), RO, CO)
    reduced = scores * up - duals.to(tl.float64) * (1.0 / UNITS.value)
    over = tl.where(inside, tl.maximum(tl.where(z < 0, -reduced, reduced), 0.0), 0.0)
    return objective, block_sum(over, RO, CO) * ROUNDED
