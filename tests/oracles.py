"""Judges of masks that know nothing of how masks are made here: enumeration, and min-cost flow from OR-tools.

Blocks are [M, M] arrays of any float dtype, non-negative and finite. The best kept sum is a float.
"""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

RESOLUTION = 2.0**40  # integer costs: the largest score of a block becomes this, so rounding is below 1e-9 relative


@cache
def all_masks(n: int, m: int) -> np.ndarray:
    """Every m×m mask with n per row and per column, bool [count, m, m]. There are 90 for 2:4; keep m small."""
    rows = [np.isin(np.arange(m), kept) for kept in itertools.combinations(range(m), n)]
    masks = np.array(list(itertools.product(rows, repeat=m)))
    return masks[(masks.sum(axis=1) == n).all(axis=1)]


def best_by_enumeration(block: np.ndarray, n: int) -> float:
    """The largest kept sum over all masks."""
    return float((all_masks(n, len(block)) * block.astype(np.float64)).sum(axis=(1, 2)).max())


def best_by_flow(block: np.ndarray, n: int) -> float:
    """The largest kept sum, by a flow of n units from every row through unit arcs into every column."""
    scores, m = block.astype(np.float64), len(block)
    if scores.max() == 0:
        return 0.0
    rows, columns = (index.ravel() for index in np.indices((m, m)))
    costs = -np.rint(scores / scores.max() * RESOLUTION).astype(np.int64)
    flow = SimpleMinCostFlow()
    arcs = flow.add_arcs_with_capacity_and_unit_cost(rows, m + columns, np.ones(m * m, np.int64), costs.ravel())
    flow.set_nodes_supplies(np.arange(2 * m), np.repeat([n, -n], m))
    assert flow.solve() == flow.OPTIMAL
    kept = flow.flows(arcs).reshape(m, m) == 1
    assert (kept.sum(axis=0) == n).all()
    assert (kept.sum(axis=1) == n).all()
    return float(scores[kept].sum())


def best_of_group(group: np.ndarray, n: int) -> float:
    """The largest sum of n scores of one group [M]."""
    return float(np.sort(group.astype(np.float64))[-n:].sum())
