"""The paper's pipeline on a GPU: each part against its reference, the whole against the optimum.

In the interpreter an iteration of a program takes milliseconds, so the hard scores are blocks side by side in one
matrix, and large blocks iterate less.
"""

import hard_scores
import numpy as np
import pytest
import torch

from tsenor_cli.kernels import entropic, entropic_reference, exact, schedule
from tsenor_cli.kernels.contract import UnusableScoresError

pytestmark = pytest.mark.slow

PATTERNS = [(1, 2), (2, 3), (1, 4), (2, 4), (3, 5), (2, 6), (4, 7), (4, 8), (7, 8), (5, 12), (8, 16), (15, 24), (8, 32)]
PATTERNS += [(24, 48), (32, 64)]
CASES = [
    (n, m, by_gain)
    for n, m in PATTERNS
    for by_gain in ([0, 1, None] if m in {4, 5, 8} else [0, None] if m < 12 else [1 if m % 16 else None])
]
HUGE = ["largest floats", "one huge"]  # in a sum, nothing else would be seen beside them


def solve(scores, n, m, device, *, export=False, absolute=False, tau=None, iterations=None, local_search=None):
    """→ mask, tally, and, if export, keys, what greedy took, and q, each [blocks, side, side]."""
    from tsenor_cli.kernels.gpu import entropic as gpu

    scores = torch.as_tensor(scores).to(device)
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=device)
    side = 1 << (m - 1).bit_length()
    states = torch.zeros((3, scores.numel() // m**2, side, side), dtype=torch.int32, device=device) if export else None
    tally = gpu.solve(scores, n, m, mask, (tau, iterations, local_search), absolute=absolute, states=states)()
    return mask.cpu().numpy(), tally, states.cpu().numpy().astype(np.int64) if export else None


def tiles(matrix, m):
    rows, columns = matrix.shape
    return matrix.reshape(rows // m, m, columns // m, m).swapaxes(1, 2).reshape(-1, m, m)


def feasible(mask, n, m):
    blocks = tiles(mask, m)
    return (blocks.sum(axis=1) == n).all() and (blocks.sum(axis=2) == n).all()


def hard(m, names=tuple(hard_scores.ALL), seed=0):
    """One block of every name, side by side: float32 [m, names * m]."""
    return np.concatenate([hard_scores.make(name, (m, m), seed) for name in names], axis=1)


def optimum(scores, n, m):
    return exact.solve_transposable(scores, n, m, np.empty(scores.shape, np.bool_)).objective


# --- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "by_gain"), CASES)
def test_rounding_is_that_of_the_reference(n, m, by_gain, device):
    """Exactly, on the kernel's own keys. S has hardly converged, so that much is left to round.

    With no iteration at all, the largest of every row has S = 1, and a column may have too many of them.
    """
    scores = hard(m) if m < 12 else hard(m, ["scaled lines", "quarters", "zeros"][: 3 if m < 24 else 1])
    mask, _, (keys, taken, q) = solve(
        scores, n, m, device, export=True, iterations=4 if by_gain is None else by_gain, local_search=by_gain
    )
    inside = np.s_[:, :m, :m]
    assert (keys[inside] >= 0).all()
    assert (np.delete(keys.reshape(len(keys), -1), np.flatnonzero(place_inside(keys, m)), axis=1) == -1).all()
    assert np.array_equal(taken.sum(axis=(1, 2)), taken[inside].sum(axis=(1, 2)))
    for block, own, greedy, gain in zip(tiles(mask, m), keys[inside], taken[inside], q[inside], strict=True):
        assert len(np.unique(own)) == m * m
        kept = entropic_reference.greedy(own, n)
        assert np.array_equal(greedy == 1, kept)
        entropic_reference.local_search(gain, kept, n, m * m if by_gain is None else by_gain)
        assert np.array_equal(block, kept)


def place_inside(keys, m):
    row, column = np.indices(keys.shape[1:])
    return ((row < m) & (column < m)).reshape(-1)


@pytest.mark.parametrize("m", [4, 5, 16])
def test_gains_are_those_of_the_scores(m, device):
    """In q the score is in units of 2^-24 of the power of two above the block's largest."""
    scores = hard(m)
    _, _, (_, _, q) = solve(scores, 2, m, device, export=True, iterations=1)
    for block, own in zip(tiles(scores, m), q[:, :m, :m], strict=True):
        if block.any():
            exponent = np.frexp(block.max())[1]
            assert np.array_equal(own, np.floor(np.ldexp(block.astype(np.float64), 24 - exponent)))


def test_equal_scores_are_a_mask_without_local_search(device):
    mask, tally, (_, taken, _) = solve(np.full((16, 16), 0.3, np.float32), 8, 16, device, export=True)
    assert np.array_equal(taken[0], mask)
    assert feasible(mask, 8, 16)
    assert tally.excess == 0


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_feasible_and_certified(n, m, device):
    others = [name for name in hard_scores.ALL if name not in {*HUGE, "denormal"}] if m < 24 else ["cubed", "zeros"]
    for names in [HUGE[: 2 if m < 24 else 1], ["denormal"], others]:
        scores = hard(m, names, seed=m)
        mask, tally, _ = solve(scores, n, m, device, iterations=25 if m <= 8 else 6 if m < 24 else 2)
        assert feasible(mask, n, m)
        assert tally.objective == pytest.approx(scores[mask].sum(dtype=np.float64), rel=1e-12, abs=0)
        best = optimum(scores, n, m)
        assert tally.objective <= best * (1 + 1e-12)
        assert tally.objective + tally.excess >= best * (1 - 1e-12)
        assert tally.worst_gap >= tally.excess / (tally.objective + tally.excess) * (1 - 1e-12)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 5), (4, 8)])
@pytest.mark.parametrize("tau", [None, 50.0])
def test_as_good_as_the_reference(n, m, tau, device):
    """The pipeline in float64, block by block, finds nearly the same sums in nearly as many iterations."""
    scores = hard(m, ["normal", "normal", "cubed", "scaled lines", "quarters"], seed=2)
    scores[:, m : 2 * m] = hard_scores.make("normal", (m, m), seed=5)
    mask, tally, _ = solve(scores, n, m, device, tau=tau)
    iterations, objectives = [], []
    for block in tiles(scores, m):
        q = np.floor(block.astype(np.float64) / block.max() * 2**24).astype(np.int64)
        relaxed = entropic_reference.dykstra(q.astype(np.float64), n, tau, schedule.DEFAULT_ITERATIONS)
        kept = entropic_reference.greedy(np.rint(relaxed.log_p * 2**20).astype(np.int64), n)
        entropic_reference.local_search(q, kept, n, n * m)
        iterations.append(relaxed.iterations)
        objectives.append(block[kept].sum(dtype=np.float64))
    assert [tile[own].sum(dtype=np.float64) for tile, own in zip(tiles(scores, m), tiles(mask, m), strict=True)] == (
        pytest.approx(objectives, rel=5e-3)
    )
    assert tally.iterations == pytest.approx(max(iterations), abs=schedule.PER_STAGE)


@pytest.mark.parametrize(("n", "m", "iterations"), [(1, 4, 300), (2, 4, 300), (5, 7, 30), (4, 8, 30), (8, 16, 60)])
def test_as_good_as_on_a_cpu(n, m, iterations, device):
    scores = hard_scores.make("normal", (m, 8 * m if m < 16 else 4 * m), seed=3)
    _, tally, _ = solve(scores, n, m, device, iterations=iterations)
    expected = entropic.solve_entropic(scores, n, m, np.empty(scores.shape, np.bool_), iterations=iterations)
    assert tally.objective == pytest.approx(expected.objective, rel=1e-4)
    assert tally.objective + tally.excess == pytest.approx(expected.objective + expected.excess, rel=1e-6)
    assert tally.iterations == pytest.approx(expected.iterations, abs=schedule.PER_STAGE)
    assert tally.unconverged == pytest.approx(expected.unconverged, abs=1)


def test_a_block_gets_the_same_mask_whatever_it_waits_for(device):
    """The first blocks are done long before the last of their program."""
    quick, slow = hard_scores.make("bf16", (4, 4), seed=3), hard_scores.make("one huge", (4, 44), seed=4)
    alone, tally, (keys, _, _) = solve(quick, 2, 4, device, export=True)
    together, slower, (all_keys, _, _) = solve(np.concatenate([slow, quick], axis=1), 2, 4, device, export=True)
    assert slower.iterations > tally.iterations
    assert np.array_equal(all_keys[-1], keys[0])
    assert np.array_equal(together[:, -4:], alone)


def test_status(device):
    scores = hard_scores.make("normal", (8, 32))
    _, stopped, _ = solve(scores, 4, 8, device, iterations=20)
    assert stopped.unconverged == 4
    assert stopped.iterations == 20
    _, settled, _ = solve(scores[:4, :16], 2, 4, device, iterations=1000)
    assert settled.unconverged == 0
    assert 20 < settled.iterations < 1000
    _, fixed, _ = solve(scores[:4, :16], 2, 4, device, tau=20.0, iterations=1000)
    assert fixed.unconverged == 0
    _, none, _ = solve(scores, 4, 8, device, iterations=0)
    assert none.iterations == 0


def test_more_iterations_and_a_larger_tau_are_better(device):
    scores = hard_scores.make("normal", (8, 128))

    def objective(**options):
        return solve(scores, 4, 8, device, **options)[1].objective

    assert objective(iterations=3) < objective(iterations=50)
    assert objective(tau=5.0, iterations=50) < objective(tau=50.0, iterations=50)
    assert objective(iterations=2, local_search=0) < objective(iterations=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 6)])
def test_dtypes_are_read_as_they_are(dtype, n, m, device):
    weight = torch.randn(2 * m, 4 * m, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask, tally, _ = solve(weight, n, m, device, absolute=True, iterations=20)
    expected, expected_tally, _ = solve(weight.abs().float(), n, m, device, iterations=20)
    assert np.array_equal(mask, expected)
    assert tally.objective == pytest.approx(float(weight.abs().double().numpy()[mask].sum()), rel=1e-12)
    assert tally.excess == pytest.approx(expected_tally.excess, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-126, 2.0**125])
def test_float32_of_any_size(scale, device):
    """The mask is that of the same scores times a power of two, even if they are the smallest of all numbers."""
    scores = np.random.default_rng(0).integers(0, 4, (8, 32)).astype(np.float32)
    mask, tally, _ = solve(scores, 4, 8, device, iterations=20)
    scaled, scaled_tally, _ = solve(scores * np.float32(scale), 4, 8, device, iterations=20)
    assert np.array_equal(mask, scaled)
    assert scaled_tally.excess == tally.excess * scale


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e300])
def test_float64_of_any_size(scale, device):
    scores = torch.rand(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * scale
    mask, tally, _ = solve(scores, 4, 8, device, iterations=30)
    assert feasible(mask, 4, 8)
    assert tally.objective == pytest.approx(float(scores.numpy()[mask].sum()), rel=1e-12, abs=0)
    assert tally.objective + tally.excess >= optimum(scores.numpy(), 4, 8) * (1 - 1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("m", [4, 5])
def test_unusable_scores(value, dtype, m, device):
    scores = torch.ones(4 * m, 5 * m, dtype=dtype)
    scores[-1, -1] = value
    with pytest.raises(UnusableScoresError):
        solve(scores, 2, m, device, iterations=2)
    if np.isfinite(value):
        solve(scores, 2, m, device, absolute=True, iterations=2)
