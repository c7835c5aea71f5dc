"""Min-cost flow, one block after the other: exact, by a solver of its own (OR-tools, cost scaling).

Hubara et al., Accelerated Sparse Neural Training (NeurIPS 2021), section 5; here with any n instead of M / 2, and with
integer costs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from tsenor_cli.masks.baselines.extra import need

RESOLUTION = 2.0**40  # the largest score of a block becomes this integer: rounding is below 1e-9 relative


def solve(blocks: torch.Tensor, n: int) -> torch.Tensor:
    """Optimal masks [B, M, M], exactly n per row and column."""
    found = [solve_block(block, n) for block in blocks.double().numpy()]
    return torch.from_numpy(np.array(found)) if found else torch.empty(blocks.shape, dtype=torch.bool)


def solve_block(block: npt.NDArray[np.float64], n: int) -> npt.NDArray[np.bool_]:
    """N units from every row through arcs of capacity one into every column, at the cost of minus the scores."""
    flow, m = need("ortools.graph.python.min_cost_flow").SimpleMinCostFlow(), len(block)
    rows, columns = (index.ravel() for index in np.indices((m, m)))
    costs = -np.rint(block / max(block.max(), np.finfo(np.float64).tiny) * RESOLUTION).astype(np.int64)
    arcs = flow.add_arcs_with_capacity_and_unit_cost(rows, m + columns, np.ones(m * m, np.int64), costs.ravel())
    flow.set_nodes_supplies(np.arange(2 * m), np.repeat([n, -n], m))
    if flow.solve() != flow.OPTIMAL:
        raise ArithmeticError("OR-tools found no flow")
    kept: npt.NDArray[np.bool_] = flow.flows(arcs).reshape(m, m) == 1
    return kept
