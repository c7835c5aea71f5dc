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
    change = start.clone()
    loss = refit(change, mask, matrix)
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
    change = start.clone()
    loss = refit(change, torch.full((4, 16), keep), matrix)
    assert torch.equal(change, start)
    assert loss == pytest.approx(loss_of(start, matrix), rel=1e-6)


def test_it_goes_on_from_where_it_starts():
    matrix = correlations(stats_of(make_inputs(64, 16)), 0.01, torch.float64).matrix
    change, mask = make_weight(4, 16, torch.float64), half(4, 16)
    loss = refit(change, mask, matrix)
    before = change.clone()
    assert refit(change, mask, matrix) == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(change, before, atol=1e-2)


def test_rows_are_cut_where_they_do_not_divide():
    """Every row is a problem of its own, whatever stands beside it."""
    matrix, mask = correlations(stats_of(make_inputs(64, 16)), 0.01, torch.float64).matrix, half(300, 16)
    together = make_weight(300, 16, torch.float64)
    apart = together.clone()
    assert refit(together, mask, matrix) == pytest.approx(loss_of(together, matrix), rel=1e-9)
    refit(apart[:7], mask[:7], matrix)
    refit(apart[290:], mask[290:], matrix)
    assert torch.allclose(apart[:7], together[:7], atol=1e-2)
    assert torch.allclose(apart[290:], together[290:], atol=1e-2)
    assert not torch.equal(apart[7:290], together[7:290])
