"""Factors against the inverse that they avoid, and damping that is raised until it suffices."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from pruners.examples import damped, make_inputs, make_weight, stats_from, stats_of
from torch.utils._python_dispatch import TorchDispatchMode

from tsenor_cli.errors import TsenorError
from tsenor_cli.pruners.alps import Alps
from tsenor_cli.pruners.base import BoundSolver
from tsenor_cli.pruners.factor import RETRIES, correlations, upper_factor
from tsenor_cli.pruners.sparsegpt import SparseGPT
from tsenor_cli.pruners.wanda import Wanda
from tsenor_cli.specs import NMPattern

INDEFINITE = torch.tensor([[1.0, 3.0], [3.0, 1.0]], dtype=torch.float64)  # eigenvalues 4 and -2


@pytest.mark.parametrize(("features", "m"), [(24, 2), (24, 4), (24, 12), (280, 4), (280, 56), (384, 64)])
def test_the_blocks_are_those_of_the_cholesky_factor_of_the_inverse(features, m):
    """In one piece of columns and in several, the last of which is not whole."""
    stats = stats_of(make_inputs(2 * features, features))
    factor = upper_factor(stats, 0.01, m, torch.float64)
    mean = stats.gram.diagonal().mean()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(stats.gram, 0.01) / mean), upper=True)
    r, pull = torch.linalg.inv(upper), factor.pull(0, features)
    for s in range(features // m):
        stripe, before = slice(s * m, s * m + m), slice(s * m)
        assert torch.allclose(factor.local[s], upper[stripe, stripe], atol=1e-12)
        assert torch.allclose(pull[stripe, before].T, r[before, stripe] @ upper[stripe, stripe], atol=1e-11)
        assert torch.allclose(factor.pull(stripe.start, stripe.stop)[:, before], pull[stripe, before], atol=1e-13)
    assert factor.damping == (0.01, 0)


@pytest.mark.parametrize("features", [5, 128, 300])
def test_one_stripe_is_the_whole_factor(features):
    """R⁻ᵀ R⁻¹ = H⁻¹, without a word about how it is cut."""
    stats = stats_of(make_inputs(features, features))
    local = upper_factor(stats, 0.1, features, torch.float64).local[0]
    assert not local.tril(-1).any()
    h = damped(stats.gram, 0.1) / stats.gram.diagonal().mean()
    assert torch.allclose(local.T @ local @ h, torch.eye(features, dtype=torch.float64), atol=1e-10)


def test_correlations_are_the_damped_gram_matrix():
    stats = stats_of(make_inputs(50, 24))
    found = correlations(stats, 0.01, torch.float64)
    assert torch.equal(found.matrix.diagonal(), torch.ones(24, dtype=torch.float64))
    back = found.matrix * found.scale * found.scale[:, None] * stats.gram.diagonal().mean()
    assert torch.allclose(back, damped(stats.gram, 0.01), rtol=1e-12)


def test_weights_with_the_same_input_share_the_factor(monkeypatch):
    """Also with another m or dtype; another damping is another factor."""
    stats, calls = stats_of(make_inputs(50, 24)), []
    cholesky = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: calls.append(1) or cholesky(matrix))
    for m, dtype in ((4, torch.float32), (12, torch.float32), (4, torch.float64)):
        upper_factor(stats, 0.01, m, dtype)
    assert len(calls) == 1
    assert correlations(stats, 0.01, torch.float32).matrix is correlations(stats, 0.01, torch.float32).matrix
    assert len(calls) == 1
    upper_factor(stats, 0.1, 4, torch.float32)
    assert len(calls) == 2


@pytest.mark.parametrize("features", [24, 300])
@pytest.mark.parametrize("damping", [0.01, 0.0])
def test_the_gram_matrix_stays_as_it_was(features, damping):
    """Its upper triangle, that is, also where some damping has not been enough."""
    stats = stats_of(make_inputs(features // 2, features))
    before = stats.gram.triu()
    assert (upper_factor(stats, damping, 4, torch.float32).damping.retries > 0) == (damping == 0.0)
    correlations(stats, damping, torch.float32)
    assert torch.equal(stats.gram.triu(), before)


@pytest.mark.parametrize("features", [24, 300])
def test_what_was_tried_before_does_not_matter(features):
    """Less damping, another one, a factor that is there already: it is the same to the bit."""
    inputs = make_inputs(features // 2, features)
    stats, fresh = stats_of(inputs), stats_of(inputs)
    settled = upper_factor(stats, 0.0, 4, torch.float64).damping
    assert settled.retries > 0
    for damping in (0.5, settled.relative, 0.01, settled.relative):
        upper_factor(stats, damping, 4, torch.float64)
    ours, theirs = (upper_factor(s, settled.relative, 4, torch.float64) for s in (stats, fresh))
    assert torch.equal(ours.local, theirs.local)
    assert torch.equal(ours.pull(8, 24)[:, :8], theirs.pull(8, 24)[:, :8])


PRUNERS = {
    "sparsegpt": (SparseGPT(), NMPattern(2, 4)),
    "sparsegpt 4:8": (SparseGPT(), NMPattern(4, 8)),
    "sparsegpt, more damping": (SparseGPT(0.1), NMPattern(2, 4)),
    "alps": (Alps(iterations=9), NMPattern(2, 4)),
    "wanda": (Wanda(), NMPattern(2, 4)),
}


@pytest.mark.parametrize("order", list(permutations(PRUNERS))[::7], ids=", ".join)
def test_methods_may_share_statistics_in_any_order(order):
    inputs, weight = make_inputs(300, 160), make_weight(16, 160)
    shared = stats_of(inputs)
    for name in order:
        pruner, pattern = PRUNERS[name]
        ours, alone = (pruner.prune(weight, BoundSolver(pattern), stats) for stats in (shared, stats_of(inputs)))
        assert torch.equal(ours.solution.mask, alone.solution.mask)
        assert torch.equal(ours.weight, alone.weight)
        assert ours.calibrated == alone.calibrated


class LargestStorage(TorchDispatchMode):
    """How many bytes the largest result of any operation takes, those in the storages of `known` left out."""

    def __init__(self, *known):
        super().__init__()
        self.nbytes = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_sparsegpt_needs_nothing_of_the_size_of_the_gram_matrix(dtype):
    weight, stats = make_weight(32, 1536, dtype), stats_of(make_inputs(100, 1536))
    with LargestStorage(stats.gram) as largest:
        SparseGPT().prune(weight, BoundSolver(NMPattern(2, 4)), stats)
    assert 0 < largest.nbytes < stats.gram.nbytes / 2


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
