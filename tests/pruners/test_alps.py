"""ALPS against least squares, against a choice among all masks, and against the other methods."""

from __future__ import annotations

import pytest
import torch
from pruners.examples import KeepAll, damped, least_squares, loss, make_inputs, make_weight, stats_of, symmetric

from tsenor_cli.errors import TsenorError
from tsenor_cli.pruners import alps
from tsenor_cli.pruners.admm import Found
from tsenor_cli.pruners.alps import Alps
from tsenor_cli.pruners.base import BoundSolver
from tsenor_cli.pruners.sparsegpt import SparseGPT
from tsenor_cli.specs import NMPattern

PATTERNS = [(2, 4, True), (2, 4, False), (4, 8, True), (8, 16, True), (3, 6, False), (16, 32, True)]


@pytest.mark.parametrize(("n", "m", "transposable"), PATTERNS)
@pytest.mark.parametrize("damping", [0.01, 1e-6])
def test_it_ends_at_least_squares_on_its_support(n, m, transposable, damping):
    weight, inputs = make_weight(96, 96), make_inputs(500, 96)
    layer = Alps(damping).prune(weight, BoundSolver(NMPattern(n, m, transposable)), stats_of(inputs))
    gram = damped(stats_of(inputs).gram, damping)
    best = loss(weight, least_squares(weight, layer.solution.mask, inputs, damping), gram)
    assert loss(weight, layer.weight, gram) <= best * (1 + 1e-4)


@pytest.mark.parametrize(("n", "m", "transposable"), PATTERNS)
@pytest.mark.parametrize("tokens", [30, 500])
def test_the_methods_come_in_the_order_of_their_effort(n, m, transposable, tokens):
    weight, stats = make_weight(96, 96, torch.bfloat16), stats_of(make_inputs(tokens, 96))
    solver = BoundSolver(NMPattern(n, m, transposable))
    ours, sparsegpt = (pruner.prune(weight, solver, stats).calibrated for pruner in (Alps(), SparseGPT()))
    assert ours.error < sparsegpt.error < sparsegpt.mask_error
    assert ours.error < ours.mask_error


def test_it_comes_near_the_best_of_all_masks():
    """Every row of 1:2 over eight inputs has 16 masks: all of them, each with its least squares."""
    weight, inputs = make_weight(40, 8), make_inputs(200, 8)
    gram = stats_of(inputs).gram
    layer = Alps(1e-6).prune(weight, BoundSolver(NMPattern(1, 2, transposable=False)), stats_of(inputs))
    choices = [[2 * group + (choice >> group & 1) for group in range(4)] for choice in range(16)]
    best = torch.full((40,), torch.inf, dtype=torch.float64)
    for kept in choices:
        mask = torch.zeros(40, 8, dtype=torch.bool)
        mask[:, kept] = True
        difference = weight.double() - least_squares(weight, mask, inputs)
        best = torch.minimum(best, ((difference @ symmetric(gram)) * difference).sum(1))
    assert float(best.sum()) * (1 - 1e-6) <= loss(weight, layer.weight, gram) <= 1.1 * float(best.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [2, 64])
def test_a_mask_that_keeps_all_changes_nothing(dtype, tokens):
    weight = make_weight(8, 32, dtype)
    layer = Alps().prune(weight, KeepAll(), stats_of(make_inputs(tokens, 32)))
    assert torch.equal(layer.weight, weight)
    assert layer.calibrated.error == 0.0


def test_dead_inputs_and_one_token():
    weight, inputs = make_weight(16, 32), make_inputs(64, 32)
    inputs[:, [0, 5, 6, 7, 31]] = 0.0
    layer = Alps().prune(weight, BoundSolver(NMPattern(2, 4)), stats_of(inputs))
    dead = inputs.eq(0).all(0)
    kept = torch.where(layer.solution.mask, weight, 0.0)
    assert torch.allclose(layer.weight[:, dead], kept[:, dead], atol=1e-2)  # only damping draws them there
    once = Alps().prune(weight, BoundSolver(NMPattern(2, 4)), stats_of(inputs[:1])).calibrated
    assert once.error < 1e-3 < once.mask_error


@pytest.mark.parametrize("update", [True, False])
def test_it_is_never_worse_than_its_first_guess(monkeypatch, update):
    """A search that ends at the worst mask is not believed."""
    weight, stats = make_weight(16, 32), stats_of(make_inputs(100, 32))
    solver = BoundSolver(NMPattern(2, 4))

    def astray(scaled, _matrix, _first, solve_mask, limit):
        worst = solve_mask(scaled.square().max() - scaled.square())
        return Found(worst, torch.where(worst.mask, 0.0, -scaled), limit)

    monkeypatch.setattr(alps, "search_mask", astray)
    layer = Alps(update=update).prune(weight, solver, stats)
    gram = damped(stats.gram, 0.01)
    first = solver(weight.double().square() * gram.diagonal()).mask
    assert torch.equal(layer.solution.mask, first)
    kept = torch.where(first, weight, 0.0)
    if update:
        best = loss(weight, least_squares(weight, first, make_inputs(100, 32), 0.01), gram)
        assert loss(weight, layer.weight, gram) <= best * (1 + 1e-4)
    else:
        assert torch.equal(layer.weight, kept)


def test_without_update_weights_stay():
    weight, stats = make_weight(16, 64, torch.bfloat16), stats_of(make_inputs(100, 64))
    plain = Alps(update=False).prune(weight, BoundSolver(NMPattern(4, 8)), stats)
    assert torch.equal(plain.weight, torch.where(plain.solution.mask, weight, 0.0))
    assert plain.calibrated.error == plain.calibrated.mask_error


def test_an_update_that_leaves_float16():
    inputs = torch.tensor([[1.0, 0.02], [0.0, 1e-4]], dtype=torch.float64)
    weight = torch.tensor([[6e4, 6e4]], dtype=torch.float16)
    solver = BoundSolver(NMPattern(1, 2, transposable=False))

    class KeepSecond(KeepAll):
        def __call__(self, scores, *, absolute=False):
            return solver(torch.ones_like(scores).cumsum(1), absolute=absolute)

    with pytest.raises(TsenorError, match="do not fit into float16"):
        Alps(1e-9).prune(weight, KeepSecond(NMPattern(1, 2)), stats_of(inputs))


def test_weights_with_the_same_input_may_share_its_statistics():
    stats, solver = stats_of(make_inputs(100, 32)), BoundSolver(NMPattern(2, 4))
    for seed in (1, 2):
        weight = make_weight(16, 32, seed=seed)
        shared, alone = (Alps().prune(weight, solver, seen) for seen in (stats, stats_of(make_inputs(100, 32))))
        assert torch.equal(shared.weight, alone.weight)
