"""What pruners ask of their statistics, and the solver that a run gives them."""

from __future__ import annotations

import pytest
import torch
from pruners.examples import make_inputs, make_weight, stats_from, stats_of

from tsenor_cli.errors import InputRefused, UsageError
from tsenor_cli.masks.solve import solve_mask
from tsenor_cli.pruners.alps import Alps
from tsenor_cli.pruners.base import BoundSolver, Calibrated, InputStats
from tsenor_cli.pruners.magnitude import Magnitude
from tsenor_cli.pruners.sparsegpt import SparseGPT
from tsenor_cli.pruners.wanda import Wanda
from tsenor_cli.specs import CALIBRATED, METHODS, NMPattern

SOLVER = BoundSolver(NMPattern(2, 4))
PRUNERS = {"magnitude": Magnitude(), "wanda": Wanda(), "sparsegpt": SparseGPT(), "alps": Alps()}
CALIBRATING = [pruner for name, pruner in PRUNERS.items() if name != "magnitude"]


def name_of(pruner) -> str:
    return type(pruner).__name__


def test_every_method_says_what_it_needs():
    assert set(PRUNERS) == set(METHODS)
    assert {name for name, pruner in PRUNERS.items() if pruner.needs != "nothing"} == CALIBRATED


@pytest.mark.parametrize("pruner", CALIBRATING, ids=name_of)
def test_statistics_are_needed(pruner):
    with pytest.raises(UsageError, match="calibrate first"):
        pruner.prune(torch.ones(4, 4), SOLVER)


@pytest.mark.parametrize("pruner", CALIBRATING[1:], ids=name_of)
def test_norms_are_no_gram_matrix(pruner):
    with pytest.raises(UsageError, match="needs the gram"):
        pruner.prune(torch.ones(4, 4), SOLVER, InputStats(1, torch.ones(4, dtype=torch.float64)))


@pytest.mark.parametrize("pruner", CALIBRATING, ids=name_of)
@pytest.mark.parametrize("shape", [(4, 8), (2, 4, 4)])
def test_statistics_of_another_layer(pruner, shape):
    with pytest.raises(UsageError, match="statistics of 4 inputs"):
        pruner.prune(torch.ones(shape), SOLVER, stats_of(make_inputs(9, 4)))


@pytest.mark.parametrize("pruner", CALIBRATING, ids=name_of)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite(pruner, bad):
    gram = torch.eye(4, dtype=torch.float64)
    gram[2, 2] = bad
    with pytest.raises(InputRefused, match="infinite or not a number"):
        pruner.prune(torch.ones(4, 4), SOLVER, stats_from(gram))


@pytest.mark.parametrize("pruner", CALIBRATING[1:], ids=name_of)
def test_a_gram_matrix_that_is_not_finite_off_its_diagonal(pruner):
    gram = torch.eye(4, dtype=torch.float64)
    gram[1, 2] = gram[2, 1] = float("nan")
    with pytest.raises(InputRefused, match="infinite or not a number"):
        pruner.prune(torch.ones(4, 4), SOLVER, stats_from(gram))


@pytest.mark.parametrize("pruner", PRUNERS.values(), ids=name_of)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_strides_dtype_and_zeros(pruner, dtype):
    weight, stats = make_weight(8, 16, dtype), stats_of(make_inputs(64, 16))
    weight[0, :4] = -0.0
    layer = pruner.prune(weight, SOLVER, stats)
    strided = pruner.prune(weight.T.contiguous().T, SOLVER, stats)
    assert torch.equal(layer.weight, strided.weight)
    assert torch.equal(layer.solution.mask, strided.solution.mask)
    assert layer.weight.dtype == dtype
    assert not layer.weight[~layer.solution.mask].any()
    assert not torch.signbit(layer.weight[layer.weight == 0]).any()
    counts = layer.solution.mask.view(2, 4, 4, 4)
    assert (counts.sum(1) == 2).all()
    assert (counts.sum(3) == 2).all()


@pytest.mark.parametrize("pruner", CALIBRATING, ids=name_of)
def test_the_unit_of_the_inputs_does_not_matter(pruner):
    weight, inputs = make_weight(8, 16), make_inputs(64, 16)
    usual = pruner.prune(weight, SOLVER, stats_of(inputs))
    for factor in (2.0**-40, 2.0**40):
        scaled = pruner.prune(weight, SOLVER, stats_of(inputs * factor))
        assert torch.equal(scaled.solution.mask, usual.solution.mask)
        assert torch.allclose(scaled.weight, usual.weight)


@pytest.mark.parametrize("pruner", CALIBRATING, ids=name_of)
@pytest.mark.parametrize("transposable", [True, False])
def test_inputs_that_are_zero_leave_magnitude(pruner, transposable):
    """Squares of weights for the two methods that square: at 2:4 standard that is the same choice."""
    weight = make_weight(8, 16)
    solver = BoundSolver(NMPattern(2, 4, transposable))
    layer = pruner.prune(weight, solver, stats_from(torch.zeros(16, 16, dtype=torch.float64)))
    scores = weight.abs() if pruner.needs == "norms" else weight.square()
    assert torch.equal(layer.solution.mask, solver(scores).mask)
    assert torch.equal(layer.weight, torch.where(layer.solution.mask, weight, 0.0))
    if pruner.needs == "gram":
        assert (layer.calibrated.error, layer.calibrated.mask_error, layer.calibrated.damping) == (0.0, 0.0, 1.0)


def test_errors_are_relative():
    seen = Calibrated(7, output_energy=8.0, mask_loss=4.0, loss=2.0, damping=0.01)
    assert (seen.mask_error, seen.error) == (0.5, 0.25)
    assert Calibrated(7).error is None
    assert Calibrated(7, output_energy=0.0, mask_loss=0.0, loss=0.0).error == 0.0


def test_what_was_computed_is_kept_by_its_key():
    stats, calls = stats_of(make_inputs(8, 4)), []
    for key in ("a", "b", "a"):
        assert stats.once(key, lambda key=key: calls.append(key) or key) == key
    assert calls == ["a", "b"]


def test_the_bound_solver_is_solve_mask():
    scores = make_weight(8, 8)
    for pattern, options in ((NMPattern(2, 4), {}), (NMPattern(2, 4), {"solver": "entropic", "tau": 50.0})):
        bound = BoundSolver(pattern, **options)(scores, absolute=True)
        direct = solve_mask(scores, pattern, absolute=True, **options)
        assert torch.equal(bound.mask, direct.mask)
        assert bound.solver == direct.solver
    with pytest.raises(UsageError, match="tau"):
        BoundSolver(NMPattern(2, 4), tau=1.0)(scores, absolute=True)
