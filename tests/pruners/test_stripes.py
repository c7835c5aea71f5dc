"""The same block in compiled code and in torch."""

from __future__ import annotations

import pytest
import torch
from pruners.examples import make_inputs, make_weight, stats_of

from tsenor_cli.masks.solve import InfeasibleMaskError
from tsenor_cli.pruners import stripes
from tsenor_cli.pruners.base import BoundSolver
from tsenor_cli.pruners.sparsegpt import SparseGPT
from tsenor_cli.specs import NMPattern


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 5), (16, 32)])
@pytest.mark.parametrize("transposable", [False, True])
def test_both_give_the_same_weights(n, m, transposable, dtype, monkeypatch):
    features, out = m * -(-160 // m), m * -(-24 // m)
    weight, solver = make_weight(out, features, dtype), BoundSolver(NMPattern(n, m, transposable))
    compiled = SparseGPT().prune(weight, solver, stats_of(make_inputs(2 * features, features)))
    monkeypatch.setattr(stripes, "InCompiledCode", stripes.InTorch)
    plain = SparseGPT().prune(weight, solver, stats_of(make_inputs(2 * features, features)))
    assert torch.equal(compiled.solution.mask, plain.solution.mask)
    assert torch.equal(compiled.solution.mask, compiled.weight != 0)
    ulps = 1e-4 if dtype in {torch.float32, torch.float64} else 4 * torch.finfo(dtype).eps
    assert torch.allclose(compiled.weight.double(), plain.weight.double(), rtol=ulps, atol=ulps)
    assert compiled.calibrated.loss == pytest.approx(plain.calibrated.loss, rel=1e-3)


class AskedForEveryStripe(BoundSolver):
    keeps_largest = False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 5), (16, 32)])
def test_a_sweep_that_chooses_by_itself_does_as_the_solver_would(n, m, dtype):
    features, out, pattern = m * -(-160 // m), 50, NMPattern(n, m, transposable=False)
    weight, inputs = make_weight(out, features, dtype), make_inputs(2 * features, features)
    alone, asking = (
        SparseGPT().prune(weight, solver(pattern), stats_of(inputs)) for solver in (BoundSolver, AskedForEveryStripe)
    )
    assert torch.equal(alone.weight, asking.weight)
    assert torch.equal(alone.solution.mask, asking.solution.mask)
    assert alone.solution.objective == pytest.approx(asking.solution.objective, rel=1e-12)
    assert (alone.solution.solver, alone.solution.blocks) == (asking.solution.solver, asking.solution.blocks)
    assert alone.calibrated == asking.calibrated


def test_a_wrong_mask_is_a_bug_and_said_to_be(monkeypatch):
    """What a solver's masks are checked for, those that the sweep chooses are."""
    monkeypatch.setattr(stripes.stripes, "finish_all", lambda block, *_: block.kept.fill(1) or 0.0)
    weight, solver = make_weight(8, 32), BoundSolver(NMPattern(2, 4, transposable=False))
    with pytest.raises(InfeasibleMaskError, match="2:4 standard"):
        SparseGPT().prune(weight, solver, stats_of(make_inputs(64, 32)))
