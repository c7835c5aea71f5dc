"""The paper's pipeline: feasible masks, gaps as promised, and each part held against its reference.

Rounding is exactly that of the reference for the same keys; Dykstra's iteration is as near as float32 allows.
"""

import hard_scores
import numpy as np
import oracles
import pytest
import torch

from tsenor_cli.kernels import dykstra, entropic, entropic_reference, exact, powers, rounding
from tsenor_cli.kernels.compilation import compiled, compiling
from tsenor_cli.kernels.contract import UnusableScoresError
from tsenor_cli.kernels.lanes import LANES, lanes, load, pointer, store

PATTERNS = [
    (1, 2),
    (1, 4),
    (2, 4),
    (3, 4),
    (3, 5),
    (2, 8),
    (4, 8),
    (7, 8),
    (8, 16),
    *(pytest.param(*pattern, marks=pytest.mark.slow) for pattern in [(9, 17), (8, 32), (16, 32), (32, 64), (63, 64)]),
]


def solve_all(solve, scores, n, m, **options):
    mask = np.empty(scores.shape, np.bool_)
    return mask, solve(scores, n, m, mask, **options)


def tiles(matrix, m):
    rows, columns = matrix.shape
    return matrix.reshape(rows // m, m, columns // m, m).swapaxes(1, 2).reshape(-1, m, m)


def feasible(mask, n, m):
    blocks = tiles(mask, m)
    return (blocks.sum(axis=1) == n).all() and (blocks.sum(axis=2) == n).all()


# --- the parts --------------------------------------------------------------------------------------------------------


@compiled
def power_lanes(x, y, logarithm):
    for k in range(len(x)):
        value = load(pointer(x), k)
        store(pointer(y), k, powers.log2(value) if logarithm else powers.exp2(value))


def test_powers_and_logarithms():
    x, y = lanes(4096, np.float32), lanes(4096, np.float32)
    x[:] = np.linspace(-126, 126, x.size, dtype=np.float32).reshape(x.shape)
    with compiling():
        power_lanes(x, y, False)
        np.testing.assert_allclose(y, np.exp2(x.astype(np.float64)), rtol=3e-7)
        x, y = y, lanes(4096, np.float32)
        power_lanes(x, y, True)
    np.testing.assert_allclose(y, np.log2(x.astype(np.float64)), rtol=2e-7, atol=2e-7)


@compiled
def run_dykstra(q, n, m, tau, most, work):
    return dykstra.dykstra(pointer(q), n, m, tau, most, dykstra.transport_pointers(work))


@compiled
def run_keys(q, m, work, chosen):
    return rounding.make_keys(pointer(q), m, dykstra.transport_pointers(work), rounding.selection_pointers(chosen))


@compiled
def run_greedy(n, m, least_full, chosen):
    rounding.greedy(n, m, least_full, rounding.selection_pointers(chosen))


@compiled
def run_local_search(q, m, most, chosen):
    rounding.local_search(pointer(q), m, most, rounding.selection_pointers(chosen))


def in_lanes(blocks):
    """Integers [LANES, m, m] → [m * m, LANES] int32."""
    q = lanes(blocks[0].size, np.int32)
    q[:] = blocks.reshape(LANES, -1).T
    return q


def blocks_of(name, m, seed=0):
    scores = tiles(hard_scores.make(name, (m, LANES * m), seed), m).astype(np.float64)
    largest = scores.max(axis=(1, 2), keepdims=True)
    return np.floor(scores / np.where(largest > 0, largest, 1) * (2**28 - 1)).astype(np.int64)


@pytest.mark.parametrize(
    ("n", "m"), [(1, 4), (2, 4), (3, 5), (4, 8), (8, 16), pytest.param(16, 32, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ["normal", "cubed", "scaled lines", "quarters", "zeros", "one huge", "sums of lines"])
@pytest.mark.parametrize("tau", [None, 50.0, 200.0])
def test_dykstra_is_that_of_the_reference(name, n, m, tau):
    """S and the bound agree with the log-domain reference, with equal numbers of iterations almost everywhere."""
    blocks = blocks_of(name, m)
    work = dykstra.transport(m)
    with compiling():
        run_dykstra(in_lanes(blocks), n, m, tau or 0.0, 150, work)
    assert np.isfinite(work.u).all()
    assert np.isfinite(work.v).all()
    for t in range(LANES):
        expected = entropic_reference.dykstra(blocks[t].astype(np.float64), n, tau, 150)
        log_p = np.log(2) * (work.state[dykstra.T, t] * blocks[t] + work.u[:, None, t] + work.v[:, t])
        if work.state[dykstra.ITERATIONS, t] == expected.iterations:  # else rounding has ended a stage earlier or later
            np.testing.assert_allclose(np.exp(np.minimum(log_p, 0)), np.exp(np.minimum(expected.log_p, 0)), atol=2e-3)
            assert work.state[dykstra.GAP, t] == pytest.approx(expected.gap, abs=2e-4)
        else:
            assert abs(work.state[dykstra.ITERATIONS, t] - expected.iterations) <= 2 * dykstra.PER_STAGE
            assert work.state[dykstra.GAP, t] == pytest.approx(expected.gap, abs=2e-2)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (8, 16), (16, 32)])
@pytest.mark.parametrize("name", hard_scores.ALL)
def test_nothing_becomes_denormal(name, n, m):
    """Processors are allowed to take a hundred times as long with such numbers, and Intel's do."""
    work = dykstra.transport(m)
    with compiling():
        run_dykstra(in_lanes(blocks_of(name, m)), n, m, 0.0, 150, work)
    assert work.p.min() >= np.finfo(np.float32).tiny


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("name", hard_scores.ALL)
@pytest.mark.parametrize("most", [0, 1, 1000])
def test_rounding_is_that_of_the_reference(name, n, m, most):
    """Exactly, on the kernel's own keys: S hardly converged, so that much is left to round."""
    blocks = blocks_of(name, m, seed=1)
    q, work, chosen = in_lanes(blocks), dykstra.transport(m), rounding.selection(m)
    with compiling():
        run_dykstra(q, n, m, 0.0, 5, work)
        least_full = run_keys(q, m, work, chosen)
        keys = chosen.key.copy()
        run_greedy(n, m, least_full, chosen)
        taken = chosen.kept.copy()
        run_local_search(q, m, most, chosen)
    assert (keys >= 0).all()
    for t in range(LANES):
        own = keys[:, t].reshape(m, m).astype(np.int64)
        assert len(np.unique(own)) == m * m
        kept = entropic_reference.greedy(own, n)
        assert np.array_equal(taken[:, t].reshape(m, m) == 1, kept)
        entropic_reference.local_search(blocks[t], kept, n, most)
        assert np.array_equal(chosen.kept[:, t].reshape(m, m) == 1, kept)
        assert (kept.sum(axis=0) == n).all()


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 5), (8, 16), (7, 8)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("most", [0, 1000])
def test_local_search_fills_any_mask_as_the_reference_does(n, m, share, most):
    """Masks that greedy selection would not leave: with free entries of lines that both have room."""
    rng = np.random.default_rng(m)
    blocks, q, chosen = blocks_of("normal", m), in_lanes(blocks_of("normal", m)), rounding.selection(m)
    kept = np.zeros((LANES, m, m), np.bool_)
    for t in range(LANES):
        for i, j in rng.permutation(np.argwhere(rng.random((m, m)) < share)):
            kept[t, i, j] = kept[t, i].sum() < n and kept[t, :, j].sum() < n
    chosen.kept[:] = kept.reshape(LANES, -1).T
    chosen.row_room[:], chosen.column_room[:] = n - kept.sum(2).T, n - kept.sum(1).T
    with compiling():
        run_local_search(q, m, most, chosen)
    for t in range(LANES):
        entropic_reference.local_search(blocks[t], kept[t], n, most)
        assert np.array_equal(chosen.kept[:, t].reshape(m, m) == 1, kept[t])
        assert feasible(kept[t], n, m)


def test_entries_with_s_equal_to_one_come_first():
    blocks = blocks_of("normal", 8)
    work, chosen = dykstra.transport(8), rounding.selection(8)
    with compiling():
        run_dykstra(in_lanes(blocks), 4, 8, 0.0, 300, work)
        least_full = run_keys(in_lanes(blocks), 8, work, chosen)
    for t in range(LANES):
        power = work.state[dykstra.T, t] * blocks[t] + work.u[:, None, t] + work.v[:, t]
        full = chosen.key[:, t].reshape(8, 8) >= least_full
        assert (power[full] > -1e-3).all()
        assert (power[~full] < 1e-3).all()


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("name", hard_scores.ALL)
def test_feasible_and_certified(name, n, m):
    scores = hard_scores.make(name, (3 * m, 2 * m), seed=m)
    mask, tally = solve_all(entropic.solve_entropic, scores, n, m)
    assert feasible(mask, n, m)
    assert tally.objective == pytest.approx(scores[mask].sum(dtype=np.float64), rel=1e-12)
    best = sum(oracles.best_by_flow(block, n) for block in tiles(scores, m))
    assert tally.objective <= best * (1 + 1e-9)
    assert tally.objective + tally.excess >= best * (1 - 1e-9)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (8, 16), (16, 32), (2, 8), (8, 32)])
@pytest.mark.parametrize("name", ["normal", "cubed", "bf16", "scaled lines"])
def test_gap(name, n, m):
    """At most 0.2 % of the optimum on normal scores, and 1 % anywhere."""
    scores = hard_scores.make(name, (256, 256))
    _, tally = solve_all(entropic.solve_entropic, scores, n, m)
    _, optimum = solve_all(exact.solve_transposable, scores, n, m)
    gap = 1 - tally.objective / optimum.objective
    assert -1e-9 <= gap <= (0.002 if name == "normal" else 0.01)


def test_more_iterations_and_a_larger_tau_are_better():
    scores = hard_scores.make("normal", (256, 256))

    def objective(**options):
        return solve_all(entropic.solve_entropic, scores, 8, 16, **options)[1].objective

    assert objective(iterations=5) < objective(iterations=50) < objective()
    assert objective(tau=10.0) < objective(tau=200.0)
    assert objective(iterations=5, local_search=0) < objective(iterations=5)


def test_status():
    scores = hard_scores.make("normal", (64, 64))
    _, stopped = solve_all(entropic.solve_entropic, scores, 8, 16, iterations=20)
    assert stopped.unconverged == 16
    assert stopped.iterations == 20
    _, settled = solve_all(entropic.solve_entropic, scores, 2, 4, iterations=1000)
    assert settled.unconverged == 0
    assert 20 < settled.iterations < 1000
    _, fixed = solve_all(entropic.solve_entropic, scores, 2, 4, tau=20.0, iterations=1000)
    assert fixed.unconverged == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_are_read_as_they_are(dtype):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    raw = weight.view({torch.bfloat16: torch.uint16, torch.float16: torch.int16}.get(dtype, dtype)).numpy()
    mask, tally = solve_all(entropic.solve_entropic, raw, 8, 16, absolute=True)
    expected, expected_tally = solve_all(entropic.solve_entropic, weight.abs().double().numpy(), 8, 16)
    assert np.array_equal(mask, expected)
    assert tally.objective == pytest.approx(expected_tally.objective, rel=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_unusable_scores(value):
    scores = np.ones((32, 40), np.float32)
    scores[31, 39] = value
    with pytest.raises(UnusableScoresError):
        solve_all(entropic.solve_entropic, scores, 4, 8)


def test_no_blocks():
    mask, tally = solve_all(entropic.solve_entropic, np.empty((0, 16), np.float32), 4, 8)
    assert mask.shape == (0, 16)
    assert tally == (0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (8, 16), (3, 5)])
def test_a_block_gets_the_same_mask_wherever_it_stands(n, m):
    block = hard_scores.make("bf16", (m, m), seed=3)
    alone, _ = solve_all(entropic.solve_entropic, block, n, m)
    for place in range(0, 44, 5):
        row, column = divmod(place, 11)
        tile = slice(row * m, (row + 1) * m), slice(column * m, (column + 1) * m)
        scores = np.random.default_rng(0).random((4 * m, 11 * m), np.float32)
        scores[tile] = block
        mask, _ = solve_all(entropic.solve_entropic, scores, n, m)
        assert np.array_equal(mask[tile], alone)
