"""One block alone: out of its matrix into the workspace, repaired, its mask back, and what its duals prove."""

from __future__ import annotations

import numpy as np

from tsenor_cli.kernels.compilation import compiled
from tsenor_cli.kernels.contract import Pointer, Untyped
from tsenor_cli.kernels.lanes import (
    LANES,
    as_bits,
    as_count,
    as_float,
    as_float64,
    as_int64,
    bits,
    from_bits,
    from_mask,
    larger,
    load,
    offset,
    spread,
    store,
    sum_of,
    where,
)
from tsenor_cli.kernels.repair import BEYOND, IMPOSSIBLE, Workspace, choose, repair


@compiled
def mend(
    tile: Pointer,
    absolute: bool,
    mask: Pointer,
    columns: int,
    n: int,
    m: int,
    factor: float,
    other_factor: float,
    afresh: bool,
    work: Workspace,
) -> int:
    """Make the mask of one block the best one; returns how many paths it took, or IMPOSSIBLE.

    Scores and mask lie in rows of `columns`. w = scores · factor · other_factor. work.duals holds duals for which every
    row of the mask is right; or, `afresh`, any, and the mask is not looked at.
    """
    take_block(tile, absolute, mask, columns, factor, other_factor, m, work)
    if afresh:
        choose(work, m, n)
    paths = repair(work, m, n)
    if paths != IMPOSSIBLE:
        put_mask(mask, columns, m, work)
    return int(paths)


@compiled
def take_block(
    tile: Pointer,
    absolute: bool,
    mask: Pointer,
    columns: int,
    factor: float,
    other_factor: float,
    m: int,
    work: Workspace,
) -> None:
    """Fill w and kept of the workspace, and raw if m is no multiple of LANES."""
    parts = -(-m // LANES)
    lines = parts * LANES
    start, stride = tile, columns
    if m % LANES != 0:
        for i in range(m):
            for j in range(m):
                work.raw[i * lines + j] = tile[i * columns + j]
        start, stride = work.raw, lines
    for i in range(m):
        kept, w, ties = np.int64(0), offset(work.w, i * lines), offset(work.ties, i * lines)
        for c in range(parts):
            score = as_float64(magnitudes(start, i * stride + c * LANES, absolute))
            store(w, c, as_int64(score * spread(factor) * spread(other_factor)) + load(ties, c))
            if m % LANES == 0:
                row = load(offset(mask, i * columns + c * LANES), 0)
                kept |= np.int64(bits(row != spread(np.uint8(0)))) << (c * LANES)
        if m % LANES != 0:
            for j in range(m):
                kept |= np.int64(mask[i * columns + j]) << j
            for j in range(m, lines):
                w[j] = -BEYOND
        work.kept[i] = kept


@compiled
def magnitudes(start: Pointer, place: int, absolute: bool) -> Untyped:
    """LANES scores in a row as floats."""
    raw = load(offset(start, place), 0)
    return as_float(from_bits(as_bits(raw, absolute), raw))


@compiled
def put_mask(mask: Pointer, columns: int, m: int, work: Workspace) -> None:
    """Write the mask back to where it lies in rows of `columns`."""
    for i in range(m):
        if m % LANES == 0:
            for c in range(m // LANES):
                store(offset(mask, i * columns + c * LANES), 0, as_count(from_mask(work.kept[i] >> (c * LANES))))
        else:
            for j in range(m):
                mask[i * columns + j] = (work.kept[i] >> j) & 1


@compiled
def weigh_block(tile: Pointer, absolute: bool, columns: int, m: int, work: Workspace) -> tuple[float, int]:
    """Σ of the kept scores, and dual value - primal value (docs/mathematics.md, eq. 4), of the block in the workspace.

    The second is of the scores without their tie terms, in the unit of w: a sum of terms ≥ 0, and 0 if optimal.
    """
    parts, total, over = -(-m // LANES), spread(0.0), spread(0)
    lines = parts * LANES
    start, stride = (tile, columns) if m % LANES == 0 else (work.raw, lines)
    for i in range(m):
        u, w, ties = spread(work.duals[lines + i]), offset(work.w, i * lines), offset(work.ties, i * lines)
        for c in range(parts):
            kept = from_mask(work.kept[i] >> (c * LANES))
            score = as_float64(magnitudes(start, i * stride + c * LANES, absolute))
            total = total + where(kept, score, spread(0.0))
            reduced = load(w, c) - load(ties, c) - load(work.duals, c) - u
            over = over + larger(where(kept, spread(0) - reduced, reduced), spread(0))
    return sum_of(total), sum_of(over)
