"""Exact repair of masks on the blocks of a tile, in int32 or int64: kernels/repair.py for a GPU (docs/mathematics.md).

A mask is part of its scores: z = w where kept, w + APART elsewhere. So one addition and one minimum per entry relax all
edges of a kind, with no test of what is kept. w ≥ 0 must be small beside FAR, FAR beside APART, a power of two.

A block that is done waits for the others of its program; only vectors say where it stands. Loops carry the tile and
scalars from round to round, and count lines anew: Triton 3.6 fails on a tile beside a vector reduced over lanes both
before a loop and in it ("remove-layout-conversions").
"""

from __future__ import annotations

import triton
import triton.language as tl

from tsenor_cli.kernels.gpu.tile import (
    column_max,
    column_min,
    column_sum,
    largest_of_all,
    row_max,
    row_min,
    row_sum,
)

NEVER = tl.constexpr(1 << 30)  # beyond every level and every number of a line
LINE = tl.constexpr(64)  # beyond every number of a line
SOURCE = tl.constexpr(64)  # added to the number of an over-full column


@triton.jit
def swap(z, v, row, column, allowed, APART: tl.constexpr, RO: tl.constexpr, CO: tl.constexpr):
    """Let rows keep what is largest in w - v: the least that is kept for the largest that is not, while it is larger.

    Only in blocks where `allowed` int32 [L, 1, 1]. v is [L, 1, CI]. Returns z.
    """
    going = 1
    while going > 0:
        x = z - v
        least, largest = row_min(x, RO, CO), row_max(x, RO, CO) - APART
        wrong = (largest > least) & (allowed > 0)
        going = largest_of_all(wrong.to(tl.int32))
        if going > 0:
            out = row_min(tl.where(x == least, column, LINE), RO, CO)
            into = row_min(tl.where(x == largest + APART, column, LINE), RO, CO)
            z = z + tl.where(column == tl.where(wrong, out, -1), APART, 0)
            z = z - tl.where(column == tl.where(wrong, into, -1), APART, 0)
    return z


@triton.jit
def wrong_counts(kept, row, column, n, M: tl.constexpr, RO: tl.constexpr, CO: tl.constexpr):
    """1 where some line of the block does not keep n, else 0: int32 [L, 1, 1]."""
    in_row = row_sum(kept.to(tl.int32), RO, CO) != tl.where(row < M, n, 0)
    in_column = column_sum(kept.to(tl.int32), RO, CO) != tl.where(column < M, n, 0)
    return tl.maximum(column_max(in_row.to(tl.int32), RO, CO), row_max(in_column.to(tl.int32), RO, CO))


@triton.jit
def too_full(kept, column, n, allowed, M: tl.constexpr, RO: tl.constexpr, CO: tl.constexpr):
    """By how much every column keeps more than n, [L, 1, CI]; 0 in blocks that are not `allowed`."""
    over = column_sum(kept.to(tl.int32), RO, CO) - tl.where(column < M, n, 0)
    return tl.where(allowed > 0, over, 0)


@triton.jit
def balance(
    z,
    v,
    row,
    column,
    n,
    allowed,
    most,
    M: tl.constexpr,
    APART: tl.constexpr,
    FAR: tl.constexpr,
    RO: tl.constexpr,
    CO: tl.constexpr,
):
    """Move units from over-full to under-full columns along cheapest paths until all columns are right.

    Only in blocks where `allowed`. z must be the best for its own row and column counts; v is kept where nothing moves.
    A pass finds the distances of all columns from the over-full ones (Bellman and Ford), and augments a path from each
    over-full column that is the nearest to some under-full one. Such paths have no line in common, and with the
    distances as prices all their edges are tight, so the mask stays the best for its counts: u are the distances of the
    rows, v those of the columns negated.

    Some row keeps an over-full column and not a given under-full one, so two edges always reach it: no distance that
    counts is above 2 max w, and every pass augments. Stops after `most` sweeps. Returns z and v.
    """
    sweeps = 0
    going = 1
    while going > 0:
        over = too_full(z < FAR, column, n, allowed, M, RO, CO)
        going = tl.where(sweeps < most, largest_of_all(over), 0)
        if going > 0:
            to_row, to_column, row_level, column_level, took = distances(z, over, most, APART, FAR, RO, CO)
            sweeps += took
            active = row_max(over, RO, CO) > 0
            v = tl.where(active, -to_column, v)
            before_column = row_parents(z, to_row, to_column, row, row_level, APART, RO, CO)
            before_row = column_parents(z, over, to_row, to_column, column, column_level, RO, CO)
            if sweeps < most:
                z = augment(z, over, before_column, before_row, row, column, APART, RO, CO)
    return z, v


@triton.jit
def distances(z, over, most, APART: tl.constexpr, FAR: tl.constexpr, RO: tl.constexpr, CO: tl.constexpr):
    """Distances of the rows and the columns from the over-full columns, and when each was last improved.

    What has not been reached, at FAR, may look like a way. It is longer than the way of two edges, which is there from
    the first sweep on. In a block without sources there is no such way, so its columns are held fast.
    """
    active = row_max(over, RO, CO) > 0
    to_column = tl.where(over > 0, 0, FAR).to(z.dtype)
    to_row = tl.zeros_like(tl.min(z, axis=2, keep_dims=True)) + FAR
    column_level = tl.where(over > 0, 0, 0)
    row_level = tl.zeros_like(to_row).to(tl.int32)
    sweep = 0
    going = 1
    while going > 0:
        through = row_min(z + to_column, RO, CO)
        nearer = through < to_row
        to_row = tl.where(nearer, through, to_row)
        row_level = tl.where(nearer, 2 * sweep + 1, row_level)
        through = -(column_max(z - to_row, RO, CO) - APART)
        closer = (through < to_column) & active
        to_column = tl.where(closer, through, to_column)
        column_level = tl.where(closer, 2 * sweep + 2, column_level)
        sweep += 1
        going = tl.where(sweep < most, largest_of_all(closer.to(tl.int32)), 0)
    return to_row, to_column, row_level, column_level, sweep


@triton.jit
def row_parents(z, to_row, to_column, row, row_level, APART: tl.constexpr, RO: tl.constexpr, CO: tl.constexpr):
    """The row before each column on a shortest path, [L, 1, CI].

    Of the tight edges the one that was reached first: it was there before what it leads to got its last value, so
    following parents goes down in levels and ends, even where lengths of zero would allow a circle.
    """
    tight = z - to_row == -(to_column - APART)
    return column_min(tl.where(tight, row_level * LINE + row, NEVER), RO, CO) % LINE


@triton.jit
def column_parents(z, over, to_row, to_column, column, column_level, RO: tl.constexpr, CO: tl.constexpr):
    """The column before each row on a shortest path, [L, RI, 1], SOURCE more if that is over-full; see row_parents."""
    tight = z + to_column == to_row
    name = column_level * (2 * LINE) + tl.where(over > 0, SOURCE, 0) + column
    return row_min(tl.where(tight, name, NEVER), RO, CO) % (2 * LINE)


@triton.jit
def augment(z, over, before_column, before_row, row, column, APART: tl.constexpr, RO: tl.constexpr, CO: tl.constexpr):
    """Take one path to an under-full column from every over-full one that leads to any; returns z."""
    todo = (over < 0).to(tl.int32)
    moved = over * 0
    taken = before_row * 0 - 1
    while largest_of_all(todo) > 0:
        goal = row_min(tl.where(todo > 0, column, LINE), RO, CO)
        goal = tl.where(goal < LINE, goal, -1)
        todo = tl.where(column == goal, 0, todo)
        root, takes = trace(goal, before_column, before_row, row, column, RO, CO)
        free = (goal >= 0) & (row_sum(tl.where(column == root, moved, 0), RO, CO) == 0)
        taken = tl.where(free & (takes >= 0), takes, taken)
        moved = tl.where(column == tl.where(free, root, -1), 1, moved)
        moved = tl.where(column == tl.where(free, goal, -1), -1, moved)
    given = tl.where(taken >= 0, before_row & (LINE - 1), -1)
    return z - tl.where(column == taken, APART, 0) + tl.where(column == given, APART, 0)


@triton.jit
def trace(goal, before_column, before_row, row, column, RO: tl.constexpr, CO: tl.constexpr):
    """Follow parents from column `goal` [L, 1, 1], nowhere if it is -1, to an over-full one.

    Returns that, and for each row [L, RI, 1] which column it takes, or -1. It gives the one before it.
    """
    takes = before_row * 0 - 1
    root = goal
    at = goal
    while largest_of_all(at) >= 0:
        via = row_sum(tl.where(column == at, before_column, 0), RO, CO)
        here = row == tl.where(at >= 0, via, -1)
        takes = tl.where(here, at, takes)
        before = column_sum(tl.where(here, before_row, 0), RO, CO)
        root = tl.where(at >= 0, before & (LINE - 1), root)
        at = tl.where((at >= 0) & (before < SOURCE), before, -1)
    return root, takes
