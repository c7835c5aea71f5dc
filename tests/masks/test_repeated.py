"""Solves that are repeated give what single ones do."""

from __future__ import annotations

import pytest
import torch

from tsenor_cli.kernels.contract import UnusableScoresError
from tsenor_cli.masks.solve import InfeasibleMaskError
from tsenor_cli.pruners.base import BoundSolver
from tsenor_cli.specs import NMPattern

SOLVERS = {
    "exact": BoundSolver(NMPattern(2, 4)),
    "entropic": BoundSolver(NMPattern(4, 8), "entropic", tau=10.0, iterations=7, local_search=1),
    "top-n": BoundSolver(NMPattern(3, 6, transposable=False)),
}


def stripes_of(solver, count=5, rows=24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(rows, solver.pattern.m, generator=generator, dtype=dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SOLVERS)
def test_each_mask_is_that_of_a_single_solve(name, dtype):
    solver = SOLVERS[name]
    repeated, single, masks = solver.repeated(24, dtype), [], []
    for scores in stripes_of(solver, dtype=dtype):
        repeated.scores.copy_(scores)
        repeated.solve()
        masks.append(repeated.mask.clone())
        single.append(solver(scores))
        assert torch.equal(masks[-1], single[-1].mask)
    solution = repeated.solution(torch.cat(masks, dim=1))
    for fact in ("objective", "upper_bound", "blocks", "repaired"):
        assert getattr(solution, fact) == pytest.approx(sum(getattr(one, fact) for one in single), rel=1e-12)
    for fact in ("worst_block_gap", "iterations"):
        assert getattr(solution, fact) == max(getattr(one, fact) for one in single)
    assert (solution.solver, solution.status) == (single[0].solver, single[0].status)
    assert solution.seconds > 0


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_scores_that_are_not_finite_are_refused(name, value):
    repeated = SOLVERS[name].repeated(24, torch.float32)
    repeated.scores.fill_(1.0)[7, 2] = value
    with pytest.raises(UnusableScoresError):
        repeated.solve()


@pytest.mark.parametrize("name", SOLVERS)
def test_the_whole_mask_is_checked(name):
    repeated = SOLVERS[name].repeated(24, torch.float32)
    repeated.scores.copy_(stripes_of(SOLVERS[name])[0])
    repeated.solve()
    wrong = repeated.mask.clone()
    wrong[3, 0] = ~wrong[3, 0]
    with pytest.raises(InfeasibleMaskError, match="row 3"):
        repeated.solution(wrong)
