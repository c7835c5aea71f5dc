"""Shortest augmenting paths for the blocks that the dual passes do not settle.

One block at a time, in int64, so that nothing is rounded: scores below 2^SCORE_BITS with their tie terms. What holds
before and after every path (docs/mathematics.md): every row keeps exactly n; w - u - v is ≥ 0 where kept and ≤ 0
elsewhere.

A block is padded to `lines` rows and columns, a multiple of LANES; what lies beyond m is never kept and never wanted.
Entries part * LANES .. of a line, a row or a column, are row part * lines + line of an array [parts * lines, LANES].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tsenor_cli.kernels.compilation import compiled
from tsenor_cli.kernels.contract import Pointer, Untyped
from tsenor_cli.kernels.lanes import (
    LANES,
    as_bits,
    as_float,
    as_float64,
    as_int64,
    bits,
    first_bit,
    from_bits,
    lanes,
    larger,
    largest_of,
    load,
    offset,
    pointer,
    smaller,
    smallest_of,
    spread,
    store,
    where,
)
from tsenor_cli.kernels.transpose import take_columns

IMPOSSIBLE = -1  # returned where theory says it cannot happen; the caller raises
NEVER = 1 << 62  # farther than any node
BEYOND = 1 << 60  # what lies beyond m has this score, negative


class Workspace(NamedTuple):
    """The scratch of one thread: everything that `repair` reads and writes. In compiled code, pointers to it."""

    raw: Untyped  # [parts * lines, LANES] scores as they are, by rows
    ties: Untyped  # [parts * lines, LANES] int64, tie terms, by rows
    w: Untyped  # [parts * lines, LANES] int64, scaled scores with tie terms, by rows
    w_columns: Untyped  # [parts * lines, LANES] by columns
    kept: Untyped  # [parts * lines, LANES] uint8, 0 or 1, by rows
    kept_columns: Untyped  # [parts * lines, LANES] by columns
    duals: Untyped  # [2 * parts, LANES] int64, v of the columns, then u of the rows
    counts: Untyped  # [parts, LANES] int64, kept per column
    distance: Untyped  # [2 * parts, LANES] int64, columns, then rows
    waiting: Untyped  # [2 * parts, LANES] int64, the distance of a node that is not done, else NEVER
    parent: Untyped  # [2 * parts, LANES] int64
    steps: Untyped  # [LANES] int64, where the lines of a square of LANES start


def workspace(dtype: np.dtype[Any], ties: npt.NDArray[np.int64]) -> Workspace:
    """Allocate a Workspace for blocks of m of scores of `dtype`, with the tie terms `ties` [m, m]."""
    m = len(ties)
    parts = -(-m // LANES)
    entries = parts * parts * LANES
    padded = np.zeros((parts * LANES, parts, LANES), np.int64)
    padded.reshape(parts * LANES, -1)[:m, :m] = ties
    return Workspace(
        raw=lanes(entries, dtype),
        ties=np.ascontiguousarray(padded.swapaxes(0, 1)).reshape(-1, LANES),
        w=lanes(entries, np.int64),
        w_columns=lanes(entries, np.int64),
        kept=lanes(entries, np.uint8),
        kept_columns=lanes(entries, np.uint8),
        duals=lanes(2 * parts, np.int64),
        counts=lanes(parts, np.int64),
        distance=lanes(2 * parts, np.int64),
        waiting=lanes(2 * parts, np.int64),
        parent=lanes(2 * parts, np.int64),
        steps=np.arange(LANES) * LANES,
    )


@compiled
def pointers(work: Workspace) -> Workspace:
    """What the compiled functions below take."""
    return Workspace(
        pointer(work.raw),
        pointer(work.ties),
        pointer(work.w),
        pointer(work.w_columns),
        pointer(work.kept),
        pointer(work.kept_columns),
        pointer(work.duals),
        pointer(work.counts),
        pointer(work.distance),
        pointer(work.waiting),
        pointer(work.parent),
        pointer(work.steps),
    )


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
    """Fill the workspace with one block: its scores, times the factors, and its mask, which lie in rows of `columns`.

    work.duals is left to the caller.
    """
    parts = -(-m // LANES)
    lines = parts * LANES
    for i in range(m):
        for j in range(m):
            place = (j // LANES * lines + i) * LANES + j % LANES
            work.raw[place], work.kept[place] = tile[i * columns + j], mask[i * columns + j]
    for i in range(m):
        for k in range(i, parts * lines, lines):
            score = as_float64(as_float(from_bits(as_bits(load(work.raw, k), absolute), load(work.raw, k))))
            store(work.w, k, as_int64(score * spread(factor) * spread(other_factor)) + load(work.ties, k))
        for j in range(m, lines):
            work.w[(j // LANES * lines + i) * LANES + j % LANES] = -BEYOND
    turn(work.w, work.w_columns, parts, work)
    turn(work.kept, work.kept_columns, parts, work)


@compiled
def put_mask(mask: Pointer, columns: int, m: int, work: Workspace) -> None:
    """Write the mask of the block back to where it lies in rows of `columns`."""
    lines = -(-m // LANES) * LANES
    for i in range(m):
        for j in range(m):
            mask[i * columns + j] = work.kept[(j // LANES * lines + i) * LANES + j % LANES]


@compiled
def repair(work: Workspace, m: int, n: int) -> int:
    """Move units until every column of work.kept holds n; return how many paths that took, or IMPOSSIBLE."""
    parts, paths = -(-m // LANES), 0
    count(work, m)
    while over_full(work, parts, n):
        target = shortest_path(work, parts, m, n)
        if target == IMPOSSIBLE:
            return IMPOSSIBLE
        shift_duals(work, parts, work.distance[target])
        flip(work, parts, target)
        paths += 1
    return paths


@compiled
def choose(work: Workspace, m: int, n: int) -> None:
    """Keep the n largest x_j = w_ij - v_j of every row: a start for any v. u_i is the smallest of them."""
    parts, x = -(-m // LANES), work.distance  # the distances are free until the first path
    lines = parts * LANES
    for i in range(m):
        for c in range(parts):
            store(x, c, load(work.w, c * lines + i) - load(work.duals, c))
            store(work.kept, c * lines + i, spread(np.uint8(0)))
        for _ in range(n):
            largest = load(x, 0)
            for c in range(1, parts):
                largest = larger(largest, load(x, c))
            value = largest_of(largest)
            j = find(x, parts, value)
            x[j] = -NEVER
            work.kept[(j // LANES * lines + i) * LANES + j % LANES] = 1
            work.duals[lines + i] = value
    turn(work.kept, work.kept_columns, parts, work)


@compiled
def find(array: Pointer, rows: int, value: int) -> int:
    """The first place of a value that is there."""
    for c in range(rows):
        found = bits(load(array, c) == spread(value))
        if found != 0:
            return int(c * LANES + first_bit(found))
    return -1


@compiled
def count(work: Workspace, m: int) -> None:
    """Count what every column keeps."""
    parts = -(-m // LANES)
    for c in range(parts):
        total = spread(0)
        for i in range(m):
            total = total + as_int64(load(work.kept, c * parts * LANES + i))
        store(work.counts, c, total)


@compiled
def turn(by_rows: Pointer, by_columns: Pointer, parts: int, work: Workspace) -> None:
    """Write the transpose of one array of a block to the other."""
    lines = parts * LANES
    for c in range(parts):
        for d in range(parts):
            square = offset(by_rows, (c * lines + d * LANES) * LANES)
            take_columns(square, work.steps, 0, by_columns, d * lines + c * LANES, 16)


@compiled
def over_full(work: Workspace, parts: int, n: int) -> bool:
    """Whether a column keeps more than n."""
    found = False
    for c in range(parts):
        found = found or bits(load(work.counts, c) > spread(n)) != 0
    return found


@compiled
def shortest_path(work: Workspace, parts: int, m: int, n: int) -> int:
    """Dijkstra from all over-full columns at once; return the nearest under-full one. Rows are nodes from lines on."""
    lines = parts * LANES
    for c in range(parts):
        start = where(load(work.counts, c) > spread(n), spread(0), spread(NEVER))
        store(work.distance, c, start)
        store(work.waiting, c, start)
        store(work.parent, c, spread(-1))
        store(work.distance, parts + c, spread(NEVER))
        store(work.waiting, parts + c, spread(NEVER))
    node = nearest(work.waiting, 2 * parts)
    while node >= 0:
        work.waiting[node] = NEVER
        reached, dual = work.distance[node], work.duals[node]
        if node >= lines:
            relax(work.w, work.kept, np.uint8(0), node - lines, 0, reached + dual, node, parts, work)
        elif node < m and work.counts[node] < n:
            return int(node)
        else:
            relax(work.w_columns, work.kept_columns, np.uint8(1), node, parts, reached - dual, node, parts, work)
        node = nearest(work.waiting, 2 * parts)
    return IMPOSSIBLE


@compiled
def nearest(waiting: Pointer, rows: int) -> int:
    """The place of the smallest number; -1 if all are NEVER."""
    least = load(waiting, 0)
    for c in range(1, rows):
        least = smaller(least, load(waiting, c))
    value = smallest_of(least)
    return int(find(waiting, rows, value)) if value < NEVER else -1


@compiled
def relax(
    scores: Pointer,
    kept: Pointer,
    state: np.uint8,
    line: int,
    first: int,
    reached: int,
    node: int,
    parts: int,
    work: Workspace,
) -> None:
    """Offer the way through `node` to the other side, along the entries of its line that are in this state.

    Column → row gives up a kept entry, at w - u - v; row → column takes a new one, at u + v - w. `reached` is the
    distance of the node and its own dual; the duals of the other side start at row `first`.
    """
    own = spread(reached)
    for c in range(parts):
        k, other = c * parts * LANES + line, first + c
        difference = load(scores, k) - load(work.duals, other)
        through = own + difference if state else own - difference
        closer = (load(kept, k) == spread(state)) & (load(work.distance, other) > through)
        store(work.distance, other, where(closer, through, load(work.distance, other)))
        store(work.waiting, other, where(closer, through, load(work.waiting, other)))
        store(work.parent, other, where(closer, spread(node), load(work.parent, other)))


@compiled
def shift_duals(work: Workspace, parts: int, length: int) -> None:
    """Move the duals by the distances, so that the path of this length costs nothing and no sign changes."""
    for c in range(2 * parts):
        way = larger(spread(length) - load(work.distance, c), spread(0))
        store(work.duals, c, load(work.duals, c) + way if c < parts else load(work.duals, c) - way)


@compiled
def flip(work: Workspace, parts: int, target: int) -> None:
    """Exchange kept and given up along the path to `target`; only the counts of its two ends change."""
    lines, column = parts * LANES, target
    work.counts[column] += 1
    while work.parent[column] >= 0:
        row = work.parent[column] - lines
        source = work.parent[row + lines]
        mark(work, lines, row, column, np.uint8(1))
        mark(work, lines, row, source, np.uint8(0))
        column = source
    work.counts[column] -= 1


@compiled
def mark(work: Workspace, lines: int, row: int, column: int, state: np.uint8) -> None:
    """Set the state of one entry, in both arrays."""
    work.kept[(column // LANES * lines + row) * LANES + column % LANES] = state
    work.kept_columns[(row // LANES * lines + column) * LANES + row % LANES] = state
