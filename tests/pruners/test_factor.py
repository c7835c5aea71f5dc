"""Factors against the inverse that they avoid, and damping that is raised until it suffices."""

from __future__ import annotations

import pytest
import torch
from pruners.examples import damped, make_inputs, make_weight, stats_from, stats_of

from tsenor_cli.errors import TsenorError
from tsenor_cli.pruners.alps import Alps
from tsenor_cli.pruners.base import BoundSolver
from tsenor_cli.pruners.factor import RETRIES, correlations, upper_factor
from tsenor_cli.pruners.sparsegpt import SparseGPT
from tsenor_cli.specs import NMPattern

INDEFINITE = torch.tensor([[1.0, 3.0], [3.0, 1.0]], dtype=torch.float64)  # eigenvalues 4 and -2


@pytest.mark.parametrize("m", [2, 4, 12])
def test_the_blocks_are_those_of_the_cholesky_factor_of_the_inverse(m):
    stats = stats_of(make_inputs(50, 24))
    factor = upper_factor(stats, 0.01, m, torch.float64)
    mean = stats.gram.diagonal().mean()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(stats.gram, 0.01) / mean), upper=True)
    r = torch.linalg.inv(upper)
    for s in range(24 // m):
        stripe = slice(s * m, s * m + m)
        assert torch.allclose(factor.local[s], upper[stripe, stripe], atol=1e-12)
        assert torch.allclose(factor.pull[stripe, : s * m].T, r[: s * m, stripe] @ upper[stripe, stripe], atol=1e-12)
    assert factor.damping == (0.01, 0)


def test_correlations_are_the_damped_gram_matrix():
    stats = stats_of(make_inputs(50, 24))
    found = correlations(stats, 0.01, torch.float64)
    assert torch.equal(found.matrix.diagonal(), torch.ones(24, dtype=torch.float64))
    back = found.matrix * found.scale * found.scale[:, None] * stats.gram.diagonal().mean()
    assert torch.allclose(back, damped(stats.gram, 0.01), rtol=1e-12)


def test_weights_with_the_same_input_share_the_factor():
    stats = stats_of(make_inputs(50, 24))
    assert upper_factor(stats, 0.01, 4, torch.float32).pull is upper_factor(stats, 0.01, 4, torch.float32).pull
    assert upper_factor(stats, 0.1, 4, torch.float32).pull is not upper_factor(stats, 0.01, 4, torch.float32).pull
    assert correlations(stats, 0.01, torch.float32).matrix is correlations(stats, 0.01, torch.float32).matrix


def test_the_gram_matrix_stays_as_it_was():
    stats = stats_of(make_inputs(50, 24))
    before = stats.gram.clone()
    upper_factor(stats, 0.01, 4, torch.float32)
    correlations(stats, 0.01, torch.float32)
    assert torch.equal(stats.gram, before)


@pytest.mark.parametrize("pruner", [SparseGPT, Alps])
@pytest.mark.parametrize(("damping", "retries", "finally_"), [(0.5, 1, 5.0), (0.01, 3, 10.0), (2.5, 0, 2.5)])
def test_damping_is_raised_and_recorded(pruner, damping, retries, finally_):
    layer = pruner(damping).prune(
        make_weight(2, 2), BoundSolver(NMPattern(1, 2)), stats_from(torch.kron(torch.eye(1), INDEFINITE))
    )
    assert layer.calibrated.damping_retries == retries
    assert layer.calibrated.damping == pytest.approx(finally_)


@pytest.mark.parametrize("pruner", [SparseGPT, Alps])
def test_without_damping_a_singular_matrix_gets_some(pruner):
    one_token = stats_of(make_inputs(1, 8))
    layer = pruner(0.0).prune(make_weight(8, 8), BoundSolver(NMPattern(2, 4)), one_token)
    assert layer.calibrated.damping == pytest.approx(1e-6 * 10 ** (layer.calibrated.damping_retries - 1))
    assert 1 <= layer.calibrated.damping_retries <= RETRIES
    assert torch.isfinite(layer.weight).all()


@pytest.mark.parametrize("pruner", [SparseGPT, Alps])
def test_it_gives_up_in_the_end(pruner):
    with pytest.raises(TsenorError, match=r"not positive definite, even with damping 1e-06: .*--method wanda"):
        pruner(1e-12).prune(make_weight(2, 2), BoundSolver(NMPattern(1, 2)), stats_from(INDEFINITE))


@pytest.mark.parametrize("seed", range(12))
def test_a_pivot_of_rounding_errors_is_no_pivot(seed):
    """LAPACK takes it half of the time: what is left of zero may be positive."""
    assert upper_factor(stats_of(make_inputs(7, 8, seed)), 0.0, 4, torch.float32).damping.retries > 0
