"""Shortest augmenting paths for the blocks that the dual passes do not settle.

One block at a time, in int64, so that nothing is rounded: scores below 2^SCORE_BITS with their tie terms. What holds
before and after every path (docs/mathematics.md): every row keeps exactly n; w - u - v is ≥ 0 where kept and ≤ 0
elsewhere.

Rows are padded to `lines`, a multiple of LANES; what lies beyond m is never kept and never wanted. A set of columns or
of rows is the bits of one int64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tsenor_cli.kernels.compilation import compiled
from tsenor_cli.kernels.contract import Pointer, Untyped
from tsenor_cli.kernels.lanes import (
    LANES,
    bit_count,
    bits,
    first_bit,
    from_mask,
    lanes,
    larger,
    largest_of,
    load,
    load_every,
    offset,
    pointer,
    smaller,
    smallest_of,
    spread,
    store,
    where,
)

IMPOSSIBLE = -1  # returned where theory says it cannot happen; the caller raises
NEVER = 1 << 62  # farther than any node
BEYOND = 1 << 60  # what lies beyond m has this score, negative


class Workspace(NamedTuple):
    """The scratch of one thread: everything that `repair` reads and writes. In compiled code, pointers to it."""

    raw: Untyped  # [m, lines] scores as they are
    ties: Untyped  # [m, lines] int64, tie terms
    w: Untyped  # [lines, lines] int64, scaled scores with tie terms
    kept: Untyped  # [lines] int64, the columns that a row keeps
    keepers: Untyped  # [lines] int64, the rows that keep a column
    duals: Untyped  # [2 * lines] int64, v of the columns, then u of the rows
    distance: Untyped  # [2 * lines] int64, columns, then rows
    parent: Untyped  # [2 * lines] int64


def workspace(dtype: np.dtype[Any], ties: npt.NDArray[np.int64]) -> Workspace:
    """Allocate a Workspace for blocks of m of scores of `dtype`, with the tie terms `ties` [m, m]."""
    m = len(ties)
    parts = -(-m // LANES)
    padded = lanes(m * parts, np.int64).reshape(m, -1)
    padded[:, :m] = ties
    return Workspace(
        raw=lanes(m * parts, dtype),
        ties=padded,
        w=lanes(parts * LANES * parts, np.int64),
        kept=lanes(parts, np.int64),
        keepers=lanes(parts, np.int64),
        duals=lanes(2 * parts, np.int64),
        distance=lanes(2 * parts, np.int64),
        parent=lanes(2 * parts, np.int64),
    )


@compiled
def pointers(work: Workspace) -> Workspace:
    """What the compiled functions below take."""
    return Workspace(
        pointer(work.raw),
        pointer(work.ties),
        pointer(work.w),
        pointer(work.kept),
        pointer(work.keepers),
        pointer(work.duals),
        pointer(work.distance),
        pointer(work.parent),
    )


@compiled
def repair(work: Workspace, m: int, n: int) -> int:
    """Move units until every column holds n; return how many paths that took, or IMPOSSIBLE."""
    lines, paths = -(-m // LANES) * LANES, 0
    find_keepers(work, m, lines)
    over_full, under_full = uneven(work, m, n)
    while over_full:
        target = shortest_path(work, over_full, under_full, lines)
        if target == IMPOSSIBLE:
            return IMPOSSIBLE
        shift_duals(work, lines, work.distance[target])
        flip(work, lines, target)
        paths += 1
        over_full, under_full = uneven(work, m, n)
    return paths


@compiled
def choose(work: Workspace, m: int, n: int) -> None:
    """Keep the n largest x_j = w_ij - v_j of every row, and let u_i be the smallest of them: a start for any v.

    The nearer u_i was to that, the less there is to do.
    """
    parts, x = -(-m // LANES), work.distance  # the distances are free until the first path
    lines = parts * LANES
    for i in range(m):
        kept, threshold = np.int64(0), spread(work.duals[lines + i])
        for c in range(parts):
            store(x, c, load(offset(work.w, i * lines), c) - load(work.duals, c))
            kept |= np.int64(bits(load(x, c) > threshold)) << (c * LANES)
        while bit_count(kept) > n:
            kept &= ~(1 << least_of(x, kept, parts))
        while bit_count(kept) < n:
            kept |= 1 << largest_without(x, kept, parts)
        work.kept[i] = kept
        work.duals[lines + i] = x[least_of(x, kept, parts)]


@compiled
def least_of(x: Pointer, members: int, parts: int) -> int:
    """The place of the smallest of the x whose bits are 1."""
    least = spread(NEVER)
    for c in range(parts):
        least = smaller(least, where(from_mask(members >> (c * LANES)), load(x, c), spread(NEVER)))
    value = smallest_of(least)
    for c in range(parts):
        found = bits(load(x, c) == spread(value)) & (members >> (c * LANES))
        if found != 0:
            return int(c * LANES + first_bit(found))
    return -1


@compiled
def largest_without(x: Pointer, members: int, parts: int) -> int:
    """The place of the largest of the x whose bits are 0."""
    largest = spread(-NEVER)
    for c in range(parts):
        largest = larger(largest, where(from_mask(members >> (c * LANES)), spread(-NEVER), load(x, c)))
    value = largest_of(largest)
    for c in range(parts):
        found = bits(load(x, c) == spread(value)) & ~(members >> (c * LANES))
        if found != 0:
            return int(c * LANES + first_bit(found))
    return -1


@compiled
def find_keepers(work: Workspace, m: int, lines: int) -> None:
    """The rows that keep each column, from the columns that each row keeps."""
    for c in range(lines // LANES):
        keepers = spread(0)
        for i in range(m):
            keepers = keepers | where(from_mask(work.kept[i] >> (c * LANES)), spread(1 << i), spread(0))
        store(work.keepers, c, keepers)


@compiled
def uneven(work: Workspace, m: int, n: int) -> tuple[int, int]:
    """The columns that hold more than n, and those that hold less."""
    over_full, under_full = np.int64(0), np.int64(0)
    for c in range(-(-m // LANES)):
        counts = bit_count(load(work.keepers, c))
        over_full |= np.int64(bits(counts > spread(n))) << (c * LANES)
        under_full |= np.int64(bits(spread(n) > counts)) << (c * LANES)
    return int(over_full), int(under_full & ((1 << (m - 1) << 1) - 1))


@compiled
def shortest_path(work: Workspace, over_full: int, under_full: int, lines: int) -> int:
    """Dijkstra from all over-full columns at once; return the nearest under-full one. Rows are nodes from lines on."""
    parts, columns, rows = lines // LANES, ~0, ~0  # that are not done
    for c in range(parts):
        store(work.distance, c, where(from_mask(over_full >> (c * LANES)), spread(0), spread(NEVER)))
        store(work.parent, c, spread(-1))
        store(work.distance, parts + c, spread(NEVER))
    while True:
        node = nearest(work.distance, columns, rows, parts)
        if node < 0:
            return IMPOSSIBLE
        if node >= lines:
            rows &= ~(1 << (node - lines))
            relax_row(work, node - lines, lines)
        elif (under_full >> node) & 1:
            return int(node)
        else:
            columns &= ~(1 << node)
            relax_column(work, node, lines)


@compiled
def nearest(distance: Pointer, columns: int, rows: int, parts: int) -> int:
    """The nearest of these nodes; -1 if none can be reached."""
    least = spread(NEVER)
    for c in range(parts):
        least = smaller(least, where(from_mask(columns >> (c * LANES)), load(distance, c), spread(NEVER)))
        least = smaller(least, where(from_mask(rows >> (c * LANES)), load(distance, parts + c), spread(NEVER)))
    value, found, found_rows = smallest_of(least), np.int64(0), np.int64(0)
    if value == NEVER:
        return -1
    for c in range(parts):
        found |= np.int64(bits(load(distance, c) == spread(value))) << (c * LANES)
        found_rows |= np.int64(bits(load(distance, parts + c) == spread(value))) << (c * LANES)
    if found & columns:
        return int(first_bit(found & columns))
    return int(parts * LANES + first_bit(found_rows & rows))


@compiled
def relax_row(work: Workspace, i: int, lines: int) -> None:
    """Offer the way through row i to the columns that it does not keep: taking one costs u + v - w."""
    node = lines + i
    own, w = spread(work.distance[node] + work.duals[node]), offset(work.w, i * lines)
    for c in range(lines // LANES):
        through = own + load(work.duals, c) - load(w, c)
        closer = (load(work.distance, c) > through) & from_mask(~(work.kept[i] >> (c * LANES)))
        store(work.distance, c, where(closer, through, load(work.distance, c)))
        store(work.parent, c, where(closer, spread(node), load(work.parent, c)))


@compiled
def relax_column(work: Workspace, j: int, lines: int) -> None:
    """Offer the way through column j to the rows that keep it: giving it up costs w - u - v."""
    own, keepers, parts = spread(work.distance[j] - work.duals[j]), work.keepers[j], lines // LANES
    for c in range(parts):
        w = load_every(offset(work.w, c * LANES * lines + j), lines)
        through, row = own + w - load(work.duals, parts + c), parts + c
        closer = (load(work.distance, row) > through) & from_mask(keepers >> (c * LANES))
        store(work.distance, row, where(closer, through, load(work.distance, row)))
        store(work.parent, row, where(closer, spread(j), load(work.parent, row)))


@compiled
def shift_duals(work: Workspace, lines: int, length: int) -> None:
    """Move the duals by the distances, so that the path of this length costs nothing and no sign changes."""
    parts = lines // LANES
    for c in range(2 * parts):
        way = larger(spread(length) - load(work.distance, c), spread(0))
        store(work.duals, c, load(work.duals, c) + way if c < parts else load(work.duals, c) - way)


@compiled
def flip(work: Workspace, lines: int, target: int) -> None:
    """Exchange kept and given up along the path to `target`; only the counts of its two ends change."""
    column = target
    while work.parent[column] >= 0:
        row = work.parent[column] - lines
        source = work.parent[row + lines]
        work.kept[row] ^= (1 << column) | (1 << source)
        work.keepers[column] ^= 1 << row
        work.keepers[source] ^= 1 << row
        column = source
