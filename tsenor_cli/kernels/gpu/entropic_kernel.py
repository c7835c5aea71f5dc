"""The pipeline of the TSENOR paper (arXiv 2505.23949) as one kernel: a block stays in registers from scores to mask."""

from __future__ import annotations

import triton
import triton.language as tl

from tsenor_cli.kernels.gpu.certificate import DUAL_LIMIT, UNITS, row_duals, weigh
from tsenor_cli.kernels.gpu.dykstra import dykstra
from tsenor_cli.kernels.gpu.rounding import TAKEN, greedy, local_search, make_keys
from tsenor_cli.kernels.gpu.scores import read, read_again
from tsenor_cli.kernels.gpu.tile import blocks_of, columns_of, largest_of_all, offsets_of, rows_of
from tsenor_cli.kernels.gpu.variant import Tiling, Variant, tiling

# What a program writes, float64 [programs, STATISTICS].
OBJECTIVE, EXCESS, WORST_GAP, MOST, UNMET, UNUSABLE = (tl.constexpr(k) for k in range(6))
STATISTICS = tl.constexpr(6)
# Triton compiles for facts about arguments, 1 or a multiple of 16, and lays the tile out otherwise for them.
_NUMBERS = ["blocks", "per_row", "stride", "n", "first", "last", "fixed", "most", "by_gain"]
_POINTERS = ["scores", "mask", "statistics", "states"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def entropic(
    scores,
    mask,
    statistics,
    states,
    blocks,
    per_row,
    stride,
    n,
    first,
    last,
    fixed,
    most,
    by_gain,
    M: tl.constexpr,
    RI: tl.constexpr,
    CI: tl.constexpr,
    RO: tl.constexpr,
    CO: tl.constexpr,
    L: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    EXPORT: tl.constexpr,
):
    """Solve this program's blocks; the numbers are those of `dykstra` and kernels/entropic.py.

    EXPORT: write the keys, what greedy selection took, and q, int32 [3, blocks, SIDE, SIDE], to `states`, for a test.
    """
    SIDE: tl.constexpr = RI * RO
    row, column, block = rows_of(L, RI, RO, CO), columns_of(L, CI, CO), blocks_of(L, RO, CO)
    real = block < blocks
    inside = real & (row < M) & (column < M)
    offset = offsets_of(per_row, stride, M, L, RI, CI, RO, CO)
    w, up, down, unusable = read(scores, offset, inside, ABSOLUTE, RO, CO)
    # A block without scores, or beyond the last one, becomes one that is solved at once: the others need not wait.
    w = tl.where(down > 0.0, w, tl.where((row < M) & (column < M) & ((row + column) % M < n), 0.75, 0.0))
    u, v, t, iterations, missed = dykstra(w, row, column, n, first, last, fixed, most, M, RO, CO)
    key, least_full = make_keys(w * t + u + v, row, column, M, SIDE)
    q = (w * UNITS).to(tl.int32)
    place = (block.to(tl.int64) * SIDE + row) * SIDE + column
    if EXPORT:
        tl.store(states + place, key, mask=real)
        tl.store(states + (place + 2 * blocks * (SIDE * SIDE)), q, mask=real)
    key, row_room, column_room = greedy(key, least_full, row, column, n, M, SIDE, RO, CO)
    z = tl.where(key == TAKEN, ~q, q)
    if EXPORT:
        tl.store(states + (place + blocks * (SIDE * SIDE)), (z < 0).to(tl.int32), mask=real)
    z = local_search(z, row_room, column_room, row, column, n, by_gain, M, RO, CO)
    tl.store(mask + offset, (z < 0).to(tl.uint8), mask=inside)
    prices = (tl.minimum(tl.maximum(-v / t, -DUAL_LIMIT), DUAL_LIMIT) * UNITS).to(tl.int32)
    duals = row_duals(z, prices, row, column, n, M, RO, CO)
    objective, excess = weigh(read_again(scores, offset, inside), up, z, duals + prices, inside, RO, CO)
    counted = real & (tl.arange(0, L)[:, None, None] % (RO * CO) == 0)
    objective, excess = tl.where(counted, objective, 0.0), tl.where(counted, excess * down, 0.0)
    gap = excess / tl.where(excess > 0.0, objective + excess, 1.0)
    here = statistics + tl.program_id(0) * STATISTICS
    tl.store(here + OBJECTIVE, sum_of_all(objective))
    tl.store(here + EXCESS, sum_of_all(excess))
    tl.store(here + WORST_GAP, tl.max(tl.max(tl.max(gap, axis=2), axis=1), axis=0))
    tl.store(here + MOST, largest_of_all(tl.where(real, iterations, 0)).to(tl.float64))
    tl.store(here + UNMET, sum_of_all(tl.where(counted, missed, 0)).to(tl.float64))
    tl.store(here + UNUSABLE, largest_of_all(tl.max(unusable, axis=2, keep_dims=True)).to(tl.float64))


@triton.jit
def sum_of_all(x):
    """[L, 1, 1] → scalar."""
    return tl.sum(tl.sum(tl.sum(x, axis=2), axis=1), axis=0)


def entropic_tiling(m: int, warp_size: int) -> Tiling:
    """How the kernel lays a block over lanes; see draft_tiling."""
    return tiling(m, warp_size, 4 if m <= 32 else 8, 8)


def variants(
    m: int, n: int, dtype: str, warp_size: int = 32, *, absolute: bool = True, export: bool = False
) -> list[Variant]:
    """The one kernel for n:m blocks of `dtype`; any n."""
    del n
    form = entropic_tiling(m, warp_size)
    numbers = {name: "fp32" if name in {"first", "last"} else "i32" for name in _NUMBERS}
    pointers = {"scores": f"*{dtype}", "mask": "*u8", "statistics": "*fp64", "states": "*i32"}
    constants = {"M": m, **form.constants, "ABSOLUTE": absolute, "EXPORT": export}
    return [Variant("entropic", entropic, pointers | numbers, constants, form.warps)]
