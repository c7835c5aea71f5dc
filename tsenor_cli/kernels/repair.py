"""Shortest augmenting paths for the blocks whose counts are still wrong after the dual passes.

One block at a time, in float64. Nodes 0 .. m-1 are the columns, m .. 2m-1 the rows. What holds before and after every
path, up to rounding (docs/mathematics.md): every row keeps exactly n; w - u - v is ≥ 0 where kept and ≤ 0 elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tsenor_cli.kernels.compilation import compiled
from tsenor_cli.kernels.contract import Untyped

IMPOSSIBLE = -1  # returned where theory says it cannot happen; the caller raises
_DONE = np.iinfo(np.int64).max
_NODE_BITS = 127  # 2 * MAX_M - 1: the low bits of a key name the node


class Workspace(NamedTuple):
    """The scratch of one thread: everything that `repair` reads and writes. m = block size."""

    w: npt.NDArray[np.float64]  # [m, m]
    w_columns: npt.NDArray[np.float64]  # [m, m], w transposed
    u: npt.NDArray[np.float64]  # [m]
    v: npt.NDArray[np.float64]  # [m]
    kept: npt.NDArray[np.uint8]  # [m, m]
    kept_columns: npt.NDArray[np.uint8]  # [m, m], kept transposed
    counts: npt.NDArray[np.int64]  # [m], kept per column
    distance: npt.NDArray[np.float64]  # [2m]
    key: npt.NDArray[np.int64]  # [2m]
    parent: npt.NDArray[np.int64]  # [2m]


@compiled
def workspace(m: int) -> Untyped:
    """Allocate a Workspace."""
    return Workspace(
        np.empty((m, m)),
        np.empty((m, m)),
        np.empty(m),
        np.empty(m),
        np.empty((m, m), np.uint8),
        np.empty((m, m), np.uint8),
        np.empty(m, np.int64),
        np.empty(2 * m),
        np.empty(2 * m, np.int64),
        np.empty(2 * m, np.int64),
    )


@compiled
def repair(work: Workspace, n: int) -> int:
    """Make work.kept optimal for work.w, starting from the duals work.u, work.v; return how many paths it took."""
    start(work, n)
    m = len(work.u)
    too_many = 0
    for j in range(m):
        too_many += max(0, work.counts[j] - n)
    for _ in range(too_many):  # every path takes one unit from an over-full column
        target = shortest_path(work, n)
        if target == IMPOSSIBLE:
            return IMPOSSIBLE
        shift_duals(work, work.distance[target])
        flip(work, target)
    return too_many


@compiled
def start(work: Workspace, n: int) -> None:
    """Choose the n of every row that the duals suggest, and count what that keeps per column."""
    work.counts[:] = 0
    for i in range(len(work.u)):
        choose(work, i, n)
        separate(work, i)
        for j in range(len(work.u)):
            work.kept_columns[j, i] = work.kept[i, j]
            work.counts[j] += work.kept[i, j]


@compiled
def choose(work: Workspace, i: int, n: int) -> None:
    """Keep the n largest x_j = w_ij - v_j of row i; of equal ones the first from the diagonal on, cyclically.

    Equal blocks then start out balanced. u_i only guides: at most a few entries lie on its wrong side.
    """
    x, kept, m, count = work.w[i] - work.v, work.kept[i], len(work.u), 0
    for j in range(m):
        kept[j] = x[j] > work.u[i]
        count += kept[j]
    for step in range(m):  # ties with u_i, all in one go
        j = i + step if i + step < m else i + step - m
        if count < n and x[j] == work.u[i]:
            kept[j] = 1
            count += 1
    while count != n:
        missing = count < n
        best, change = -np.inf, 0
        for step in range(m):
            j = i + step if i + step < m else i + step - m
            gain = x[j] if missing else -x[j]
            if (kept[j] == 0) == missing and gain > best:
                best, change = gain, j
        kept[change] = missing
        count += 1 if missing else -1


@compiled
def separate(work: Workspace, i: int) -> None:
    """Move u_i between the kept and the other x_j of row i, if it is not there."""
    lowest, highest = np.inf, -np.inf
    for j in range(len(work.u)):
        x = work.w[i, j] - work.v[j]
        if work.kept[i, j]:
            lowest = min(lowest, x)
        else:
            highest = max(highest, x)
    if not lowest >= work.u[i] >= highest:
        work.u[i] = 0.5 * (lowest + highest)


@compiled
def shortest_path(work: Workspace, n: int) -> int:
    """Dijkstra from all over-full columns at once; return the nearest under-full one.

    Column → row gives up a kept entry, row → column takes a new one. The queue is an array of keys: the bits of a
    non-negative float64 order like an integer, and the low ones are replaced by the node, so that the next node is
    a plain minimum, which the compiler vectorises. It errs by 2⁻⁴⁵ relative, far below what the certificate sees.
    """
    m, distance, key, parent = len(work.u), work.distance, work.key, work.parent
    bits = distance.view(np.int64)
    for j in range(m):
        distance[j] = 0.0 if work.counts[j] > n else np.inf
        distance[m + j] = np.inf
    for k in range(2 * m):
        key[k] = (bits[k] & ~_NODE_BITS) | k
        parent[k] = -1
    for _ in range(2 * m):
        nearest = _DONE
        for k in range(2 * m):
            nearest = min(nearest, key[k])
        node = nearest & _NODE_BITS
        reached = distance[node]
        if reached == np.inf:
            return IMPOSSIBLE
        key[node] = _DONE
        if node >= m:
            relax(work.w[node - m], work.kept[node - m], 0, work.u[node - m], work.v, 0, node, work)
        elif work.counts[node] < n:
            return node
        else:
            relax(work.w_columns[node], work.kept_columns[node], 1, work.v[node], work.u, m, node, work)
    return IMPOSSIBLE


@compiled
def relax(
    scores: npt.NDArray[np.float64],
    kept: npt.NDArray[np.uint8],
    wanted: int,
    own_dual: float,
    duals: npt.NDArray[np.float64],
    first: int,
    node: int,
    work: Workspace,
) -> None:
    """Offer the way through `node` to the nodes first .. first+m-1, along its entries where kept == wanted."""
    m, reached, sign = len(duals), work.distance[node], 1.0 if wanted else -1.0
    distance, key, parent = (
        work.distance[first : first + m],
        work.key[first : first + m],
        work.parent[first : first + m],
    )
    bits = distance.view(np.int64)
    for k in range(m):
        cost = sign * (scores[k] - own_dual - duals[k])
        through = reached + max(cost, 0.0)
        closer = (kept[k] == wanted) & (through < distance[k]) & (key[k] != _DONE)
        distance[k] = through if closer else distance[k]
        parent[k] = node if closer else parent[k]
        key[k] = (bits[k] & ~_NODE_BITS) | (first + k) if closer else key[k]


@compiled
def shift_duals(work: Workspace, length: float) -> None:
    """Move the duals by the distances, so that the path of this length costs nothing and no sign changes."""
    m = len(work.u)
    for k in range(m):
        if work.distance[k] < length:
            work.v[k] += length - work.distance[k]
        if work.distance[m + k] < length:
            work.u[k] -= length - work.distance[m + k]


@compiled
def flip(work: Workspace, target: int) -> None:
    """Exchange kept and given up along the path to `target`; only the counts of its two ends change."""
    m, column = len(work.u), target
    work.counts[column] += 1
    for _ in range(m):  # a path visits no column twice
        if work.parent[column] < 0:
            break
        row = work.parent[column] - m
        source = work.parent[row + m]
        work.kept[row, column] = work.kept_columns[column, row] = 1
        work.kept[row, source] = work.kept_columns[source, row] = 0
        column = source
    work.counts[column] -= 1
