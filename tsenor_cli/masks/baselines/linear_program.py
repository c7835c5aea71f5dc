"""The linear program of docs/mathematics.md (1), by general solvers.

HiGHS ends at a vertex, which is a mask. PDLP (Applegate et al. 2021, of which cuPDLP is the GPU version) is a
first-order method: it ends near the middle of the optimal face, and is rounded like the paper's pipeline.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tsenor_cli.masks.baselines.extra import need
from tsenor_cli.masks.baselines.plain_torch import greedy, local_search

BATCH = 256  # blocks in one program for PDLP
TOLERANCE = 1e-6  # relative, of PDLP's gap and residuals


def solve_highs(blocks: torch.Tensor, n: int) -> torch.Tensor:
    """Optimal masks [B, M, M], exactly n per row and column; one program per block, by HiGHS (scipy)."""
    linprog, equal = need("scipy.optimize").linprog, _constraints(blocks.shape[1], 1)
    found = []
    for block in blocks.double().numpy():
        result = linprog(-block.ravel(), A_eq=equal, b_eq=np.full(equal.shape[0], n), bounds=(0, 1), method="highs-ds")
        found.append(result.x.reshape(block.shape) > 0.5)
    return torch.from_numpy(np.array(found)) if found else torch.empty(blocks.shape, dtype=torch.bool)


def solve_pdlp(blocks: torch.Tensor, n: int) -> torch.Tensor:
    """Good masks [B, M, M], exactly n per row and column; BATCH blocks in a program, by PDLP (OR-tools), rounded."""
    if len(blocks) == 0:
        return torch.empty(blocks.shape, dtype=torch.bool)
    scaled = blocks.double() / blocks.double().amax((1, 2), keepdim=True).clamp_min(1e-300)
    mask = greedy(torch.cat([torch.from_numpy(_relaxed(part.numpy(), n)) for part in torch.split(scaled, BATCH)]), n)
    local_search(blocks.double(), mask, n)
    return mask


def _relaxed(blocks: npt.NDArray[np.float64], n: int) -> npt.NDArray[np.float64]:
    pdlp, solvers = need("ortools.pdlp.python.pdlp"), need("ortools.pdlp.solvers_pb2")
    equal = _constraints(blocks.shape[1], len(blocks))
    program = pdlp.QuadraticProgram()
    program.resize_and_initialize(equal.shape[1], equal.shape[0])
    program.objective_vector = -blocks.ravel()
    program.constraint_matrix = equal
    program.constraint_lower_bounds = program.constraint_upper_bounds = np.full(equal.shape[0], float(n))
    program.variable_lower_bounds, program.variable_upper_bounds = np.zeros(equal.shape[1]), np.ones(equal.shape[1])
    parameters = solvers.PrimalDualHybridGradientParams()
    criteria = parameters.termination_criteria.simple_optimality_criteria
    criteria.eps_optimal_relative = criteria.eps_optimal_absolute = TOLERANCE
    result = pdlp.primal_dual_hybrid_gradient(program, parameters)
    relaxed: npt.NDArray[np.float64] = np.array(result.primal_solution).reshape(blocks.shape)
    return relaxed


def _constraints(m: int, count: int) -> Any:  # noqa: ANN401  (scipy publishes no types)
    """The rows and columns of `count` blocks that have to sum to n, as a sparse matrix."""
    sparse = need("scipy.sparse")
    ones, eye = np.ones((1, m)), sparse.identity(m)
    block = sparse.vstack([sparse.kron(eye, ones), sparse.kron(ones, eye)])
    return sparse.csc_matrix(sparse.kron(sparse.identity(count), block))
