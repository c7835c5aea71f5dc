"""Magnitude keeps the largest absolute weights, and takes whatever solver it is given."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tsenor_cli.masks.solve import solve_mask
from tsenor_cli.pruners.magnitude import Magnitude
from tsenor_cli.specs import NMPattern


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_standard_keeps_the_two_largest_of_four(dtype):
    weight = torch.tensor([[1.0, -3.0, 2.0, -0.5], [-0.25, 0.0, -4.0, 8.0]], dtype=dtype)
    layer = Magnitude().prune(weight, partial(solve_mask, pattern=NMPattern(2, 4, transposable=False)))
    assert layer.weight.tolist() == [[0.0, -3.0, 2.0, 0.0], [0.0, 0.0, -4.0, 8.0]]
    assert layer.weight.dtype == dtype


def test_transposable_keeps_the_best_tile():
    weight = torch.tensor([[9.0, -8.0, 1.0, 1.0], [-8.0, 9.0, 1.0, 1.0], [7.0, 7.0, 2.0, -3.0], [7.0, 7.0, -3.0, 2.0]])
    layer = Magnitude().prune(weight, partial(solve_mask, pattern="2:4"))
    expected = torch.zeros(4, 4)
    expected[:2, :2], expected[2:, 2:] = weight[:2, :2], weight[2:, 2:]  # 34 + 10 beats every other choice
    assert torch.equal(layer.weight, expected)
    assert layer.solution.objective == 44.0


def test_it_asks_for_the_absolute_weights_and_only_once():
    weight, asked = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), []

    def ask(scores, *, absolute=False):
        asked.append((scores, absolute))
        return solve_mask(scores, "2:4", absolute=absolute)

    layer = Magnitude().prune(weight.t(), ask)
    assert len(asked) == 1
    assert torch.equal(asked[0][0], weight.t())
    assert asked[0][1]
    assert torch.equal(layer.solution.mask, solve_mask(weight.t().abs(), "2:4").mask)
