"""The search for a mask against the algorithm as the paper and its authors write it."""

from __future__ import annotations

import pytest
import torch
from pruners.examples import KeepAll, make_inputs, make_weight, stats_of

from tsenor_cli.pruners.admm import _Penalty, search_mask
from tsenor_cli.pruners.base import BoundSolver
from tsenor_cli.pruners.factor import correlations
from tsenor_cli.specs import NMPattern


def reference(weight, matrix, solver, limit):
    """Algorithm 1 with the authors' schedule: B, D and V written out, one inverse for every iteration, in float64."""
    weight, matrix = weight.double(), matrix.double()
    eye, rho, raised = torch.eye(len(matrix), dtype=torch.float64), 0.1, False
    first = seen = solver(weight.square()).mask
    kept = int(first.sum())
    d, v = weight * first, torch.zeros_like(weight)
    for t in range(1, limit + 1):
        b = (weight @ matrix - v + rho * d) @ torch.linalg.inv(matrix + rho * eye)
        mask = solver((b + v / rho).square()).mask
        d = (b + v / rho) * mask
        v = v + rho * (b - d)
        if t % 3 == 0:
            moved = int((mask != seen).sum())
            seen = mask
            if moved > 0.1 * kept:
                rho, raised = rho * 1.3, True
            elif moved > 0.005 * kept:
                rho, raised = rho * 1.2, True
            elif moved > 0:
                if raised:
                    rho = rho * 1.1
                else:
                    rho, d, v = rho / 5, weight * first, torch.zeros_like(weight)
            elif raised:
                break
            else:
                rho = rho / 5
            if t > 30 and moved < 0.0003 * kept:
                break
    mask = solver(b.square()).mask
    return b * mask, mask, t


@pytest.mark.parametrize("transposable", [True, False])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (3, 6)])
@pytest.mark.parametrize("limit", [1, 2, 3, 20, 300])
def test_it_is_the_authors_algorithm(n, m, transposable, limit):
    weight = make_weight(24, 48, torch.float64)
    matrix, scale, _ = correlations(stats_of(make_inputs(96, 48)), 0.01, torch.float64)
    solver, scaled = BoundSolver(NMPattern(n, m, transposable)), weight * scale
    found = search_mask(scaled, matrix, solver(scaled.square()), solver, limit)
    values, mask, iterations = reference(scaled, matrix, solver, limit)
    assert torch.equal(found.solution.mask, mask)
    assert found.iterations == iterations
    assert torch.allclose(scaled + found.change, values, atol=1e-8)


def test_a_mask_that_hardly_moves_makes_the_search_start_again(monkeypatch):
    """Two weights of each four are a tenth of the others, but for one group, where V soon makes them change sides."""
    restarts = []
    adapt = _Penalty.adapt
    monkeypatch.setattr(
        _Penalty, "adapt", lambda penalty, moved: restarts.append(adapt(penalty, moved)) or restarts[-1]
    )
    inputs = torch.linalg.qr(make_inputs(96, 48)).Q + 0.01 * make_inputs(96, 48, seed=3)
    weight = make_weight(24, 48, torch.float64).sign() * torch.tensor([1.0, 0.1] * 24)
    weight[5, 9] = 0.5
    matrix, scale, _ = correlations(stats_of(inputs), 0.01, torch.float64)
    solver, scaled = BoundSolver(NMPattern(2, 4, transposable=False)), weight * scale
    found = search_mask(scaled, matrix, solver(scaled.square()), solver, 11)
    values, mask, iterations = reference(scaled, matrix, solver, 11)
    assert True in restarts
    assert torch.equal(found.solution.mask, mask)
    assert found.iterations == iterations
    assert torch.allclose(scaled + found.change, values, atol=1e-8)


def test_no_iterations_leave_the_first_mask():
    weight = make_weight(8, 16)
    matrix = correlations(stats_of(make_inputs(64, 16)), 0.01, torch.float32).matrix
    solver = BoundSolver(NMPattern(2, 4))
    first = solver(weight.square())
    found = search_mask(weight, matrix, first, solver, 0)
    assert torch.equal(found.solution.mask, first.mask)
    assert torch.equal(weight + found.change, weight * first.mask)


def test_a_mask_that_keeps_all_changes_nothing():
    weight = make_weight(8, 16)
    matrix = correlations(stats_of(make_inputs(2, 16)), 1e-6, torch.float32).matrix
    found = search_mask(weight, matrix, KeepAll()(weight), KeepAll(), 300)
    assert not found.change.any()
    assert found.iterations == 33


@pytest.mark.parametrize(
    ("raised", "moved", "rho", "restart"),
    [
        (False, 0.2, 0.13, False),
        (False, 0.01, 0.12, False),
        (False, 0.005, 0.02, True),
        (False, 0.0, 0.02, False),
        (True, 0.2, 0.13, False),
        (True, 0.01, 0.12, False),
        (True, 0.005, 0.11, False),
    ],
)
def test_the_next_penalty(raised, moved, rho, restart):
    penalty = _Penalty(raised=raised)
    assert penalty.adapt(moved) == restart
    assert penalty.rho == pytest.approx(rho)
    assert penalty.raised == (raised or moved > 0.005)


def test_the_penalty_has_bounds():
    penalty = _Penalty(rho=9e5, raised=True)
    penalty.adapt(0.2)
    assert penalty.rho == 1e6
    penalty = _Penalty(rho=2e-4)
    penalty.adapt(0.0)
    assert penalty.rho == 1e-4
