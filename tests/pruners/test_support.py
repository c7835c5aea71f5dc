"""The refit against least squares by a library, row by row."""

from __future__ import annotations

import pytest
import torch
from pruners.examples import damped, least_squares, make_inputs, make_weight, stats_of

from tsenor_cli.pruners.factor import correlations
from tsenor_cli.pruners.support import loss_of, refit


def half(out, features):
    return torch.rand(out, features, generator=torch.Generator().manual_seed(5)) < 0.5


@pytest.mark.parametrize("tokens", [20, 64, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_least_squares_on_the_support(tokens, dtype):
    weight, inputs, mask = make_weight(12, 48, dtype), make_inputs(tokens, 48), half(12, 48)
    stats = stats_of(inputs)
    matrix, scale, _ = correlations(stats, 0.01, dtype)
    start = torch.where(mask, 0.0, -weight * scale)
    change, loss = refit(start, mask, matrix)
    assert torch.equal(change[~mask], start[~mask])
    gram = damped(stats.gram, 0.01) / stats.gram.diagonal().mean()
    best = least_squares(weight, mask, inputs, 0.01) - weight.double()
    least = float(((best @ gram) * best).sum())
    assert least * (1 - 1e-6) <= loss <= least * (1 + 1e-4)
    assert loss == pytest.approx(loss_of(change, matrix), rel=1e-3)


@pytest.mark.parametrize("keep", [True, False])
def test_nothing_to_do(keep):
    """All kept and nothing changed, or nothing kept that could change."""
    matrix = correlations(stats_of(make_inputs(64, 16)), 0.01, torch.float32).matrix
    start = torch.zeros(4, 16) if keep else make_weight(4, 16)
    change, loss = refit(start, torch.full((4, 16), keep), matrix)
    assert torch.equal(change, start)
    assert loss == pytest.approx(loss_of(start, matrix), rel=1e-6)


def test_it_starts_where_it_is_told_and_leaves_that_alone():
    matrix = correlations(stats_of(make_inputs(64, 16)), 0.01, torch.float64).matrix
    start, mask = make_weight(4, 16, torch.float64), half(4, 16)
    before = start.clone()
    change, loss = refit(start, mask, matrix)
    again, same = refit(change, mask, matrix)
    assert torch.equal(start, before)
    assert same == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(again, change, atol=1e-2)
