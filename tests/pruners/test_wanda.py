"""Wanda: the formula of the paper, entry by entry."""

from __future__ import annotations

import pytest
import torch
from pruners.examples import make_inputs, make_weight, stats_of

from tsenor_cli.pruners.base import BoundSolver, InputStats
from tsenor_cli.pruners.wanda import Wanda
from tsenor_cli.specs import NMPattern


def test_scores_are_weight_times_norm():
    weight, inputs = make_weight(3, 8), make_inputs(20, 8)
    layer = Wanda().prune(weight, BoundSolver(NMPattern(2, 4, transposable=False)), stats_of(inputs))
    for i in range(3):
        for group in (range(4), range(4, 8)):
            score = {j: abs(float(weight[i, j])) * sum(float(x) ** 2 for x in inputs[:, j]) ** 0.5 for j in group}
            best = sorted(score, key=score.get)[2:]
            assert [j for j in group if layer.solution.mask[i, j]] == sorted(best)
    assert torch.equal(layer.weight, torch.where(layer.solution.mask, weight, 0.0))


def test_a_loud_input_beats_a_large_weight():
    weight = torch.tensor([[1.0, 10.0, 1.0, 1.0]])
    stats = InputStats(5, torch.tensor([10000.0, 1.0, 400.0, 0.0], dtype=torch.float64))
    layer = Wanda().prune(weight, BoundSolver(NMPattern(2, 4, transposable=False)), stats)
    assert layer.weight.tolist() == [[1.0, 0.0, 1.0, 0.0]]
    assert layer.calibrated.tokens == 5
    assert layer.calibrated.error is None
    assert layer.calibrated.damping is None


@pytest.mark.parametrize("transposable", [True, False])
def test_inputs_that_were_never_seen_are_chosen_by_magnitude(transposable):
    weight, norms = torch.zeros(4, 8), torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.float64)
    weight[:, :4] = torch.tensor([[0.1, 0.2, 3.0, 4.0], [3.0, 4.0, 0.1, 0.2]]).repeat(2, 1)
    weight[:, 4:] = torch.tensor([[0.5, 0.1, 0.2, 0.3], [0.2, 0.3, 0.5, 0.1]]).repeat(2, 1)
    layer = Wanda().prune(weight, BoundSolver(NMPattern(2, 4, transposable)), InputStats(5, norms))
    expected = BoundSolver(NMPattern(2, 4, transposable))(weight, absolute=True).mask
    assert torch.equal(layer.solution.mask, expected)


def test_what_was_not_seen_loses_against_what_was():
    weight = torch.tensor([[100.0, 0.01, 0.01, 50.0]])
    stats = InputStats(5, torch.tensor([0.0, 1.0, 0.1, 0.0], dtype=torch.float64))
    layer = Wanda().prune(weight, BoundSolver(NMPattern(2, 4, transposable=False)), stats)
    assert layer.solution.mask.tolist() == [[False, True, True, False]]


def test_transposable_masks_keep_the_largest_sum():
    weight, inputs = make_weight(8, 8), make_inputs(20, 8)
    solver = BoundSolver(NMPattern(2, 4))
    layer = Wanda().prune(weight, solver, stats_of(inputs))
    scores = weight.double().abs() * inputs.square().sum(0).sqrt()
    assert torch.equal(layer.solution.mask, solver(scores).mask)
