"""Both transposable solvers against judges that know nothing of the method, on scores that are hard.

Objectives are compared with the oracles to 1e-6 relative, block by block; masks with the reference exactly, where only
one mask is optimal.
"""

import hard_scores
import numpy as np
import oracles
import pytest

from tsenor_cli.kernels import cpu, reference
from tsenor_cli.kernels.compilation import compiling
from tsenor_cli.kernels.contract import UnusableScoresError
from tsenor_cli.kernels.repair import repair, workspace

COMMON = [(1, 4), (2, 4), (3, 4), (2, 8), (4, 8), (4, 16), (8, 16), (8, 32), (16, 32), (32, 64)]
ODD = [(1, 2), (2, 3), (3, 5), (5, 7), (6, 12), (9, 17), (1, 64), (63, 64)]
SOLVERS = pytest.mark.parametrize("solve", [cpu.solve_transposable, reference.solve_transposable], ids=["cpu", "ref"])


def solve_all(solve, scores, n, m):
    mask = np.empty(scores.shape, np.bool_)
    return mask, solve(scores, n, m, mask)


def tiles(matrix, m):
    rows, columns = matrix.shape
    return matrix.reshape(rows // m, m, columns // m, m).swapaxes(1, 2).reshape(-1, m, m)


def assert_optimal(scores, mask, tally, n, m):
    objective = 0.0
    for block, kept in zip(tiles(scores, m), tiles(mask, m), strict=True):
        assert (kept.sum(axis=0) == n).all()
        assert (kept.sum(axis=1) == n).all()
        value, best = block[kept].sum(dtype=np.float64), oracles.best_by_flow(block, n)
        assert value == pytest.approx(best, rel=1e-6, abs=0)
        objective += value
    assert tally.objective == pytest.approx(objective, rel=1e-12, abs=0)
    assert 0 <= tally.excess <= 1e-8 * objective
    assert 0 <= tally.worst_gap <= 1e-8


@pytest.mark.parametrize(("n", "m"), COMMON + ODD)
@pytest.mark.parametrize("name", hard_scores.ALL)
def test_cpu_is_optimal(name, n, m):
    scores = hard_scores.make(name, (3 * m, 2 * m), seed=m)
    mask, tally = solve_all(cpu.solve_transposable, scores, n, m)
    assert_optimal(scores, mask, tally, n, m)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 5), (2, 8), (8, 16), (8, 32)])
@pytest.mark.parametrize("name", hard_scores.ALL)
def test_reference_is_optimal(name, n, m):
    scores = hard_scores.make(name, (2 * m, m), seed=m)
    mask, tally = solve_all(reference.solve_transposable, scores, n, m)
    assert_optimal(scores, mask, tally, n, m)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", hard_scores.ALL)
def test_enumeration_agrees(name, n):
    scores = hard_scores.make(name, (32, 24))
    mask, _ = solve_all(cpu.solve_transposable, scores, n, 4)
    for block, kept in zip(tiles(scores, 4), tiles(mask, 4), strict=True):
        best = oracles.best_by_enumeration(block, n)
        assert block[kept].sum(dtype=np.float64) == pytest.approx(best, rel=1e-6, abs=0)


def test_there_are_90_masks_of_2_4():
    assert len(oracles.all_masks(2, 4)) == 90


@pytest.mark.parametrize(("n", "m"), COMMON + ODD)
@pytest.mark.parametrize("name", hard_scores.CONTINUOUS)
def test_cpu_finds_the_mask_of_the_reference(name, n, m):
    scores = hard_scores.make(name, (2 * m, 3 * m), seed=1)
    mask, tally = solve_all(cpu.solve_transposable, scores, n, m)
    expected, expected_tally = solve_all(reference.solve_transposable, scores, n, m)
    assert np.array_equal(mask, expected)
    assert tally.objective == pytest.approx(expected_tally.objective, rel=1e-12)


@SOLVERS
def test_equal_scores_need_no_repair(solve):
    for value in (0.0, 0.3, 1e-40, 3e38):
        _, tally = solve_all(solve, np.full((64, 64), value, np.float32), 8, 16)
        assert tally.objective == pytest.approx(float(np.float32(value)) * 64 * 32, rel=1e-12)
        assert tally.excess == 0
        assert tally.repaired == 0


@SOLVERS
@pytest.mark.parametrize("scale", [1e-300, 1e-60, 1e60, 1e300])
def test_float64_beyond_float32(solve, scale):
    scores = hard_scores.make("normal", (16, 16)).astype(np.float64)
    mask, tally = solve_all(solve, scores * scale, 4, 8)
    expected, unscaled = solve_all(solve, scores, 4, 8)
    assert np.array_equal(mask, expected)
    assert tally.objective == pytest.approx(unscaled.objective * scale, rel=1e-6)


def test_blocks_of_one_float64_tensor_may_differ_by_any_factor():
    scores = np.random.default_rng(0).random((16, 16)) * np.repeat([1e-300, 1e300], 8)[:, None]
    mask, _ = solve_all(cpu.solve_transposable, scores, 4, 8)
    for block, kept in zip(tiles(scores, 8), tiles(mask, 8), strict=True):
        assert block[kept].sum() == pytest.approx(oracles.best_by_flow(block, 4), rel=1e-6)


@SOLVERS
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0, -1e-45])
@pytest.mark.parametrize("place", [0, 555, 32 * 40 - 1])
def test_unusable_scores(solve, value, place):
    scores = np.ones((32, 40), np.float32)
    scores.reshape(-1)[place] = value
    with pytest.raises(UnusableScoresError):
        solve_all(solve, scores, 4, 8)


@SOLVERS
def test_no_blocks(solve):
    mask, tally = solve_all(solve, np.empty((0, 16), np.float32), 4, 8)
    assert mask.shape == (0, 16)
    assert tally == (0.0, 0.0, 0.0, 0)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (8, 16), (3, 5)])
@pytest.mark.parametrize("name", ["normal", "integers", "sparse", "bf16"])
def test_a_block_gets_the_same_mask_wherever_it_stands(name, n, m):
    block = hard_scores.make(name, (m, m), seed=3)
    alone, _ = solve_all(cpu.solve_transposable, block, n, m)
    neighbours = np.random.default_rng(0).random((4 * m, 11 * m), np.float32)  # 44 blocks: groups reach over row ends
    for row in range(4):
        for column in range(11):
            tile = slice(row * m, (row + 1) * m), slice(column * m, (column + 1) * m)
            scores = neighbours.copy()
            scores[tile] = block
            mask, _ = solve_all(cpu.solve_transposable, scores, n, m)
            assert np.array_equal(mask[tile], alone)


def near_ties():
    """Scores whose float32 duals round to the wrong side now and then, with counts that look right."""
    rng = np.random.default_rng(11)
    lines = (rng.random((960, 1)) ** 3 + rng.random(960) ** 3).astype(np.float32)
    return (lines * (1 + 5e-7 * rng.standard_normal(lines.shape))).astype(np.float32)


def test_blocks_that_float32_leaves_loose_are_solved_again(monkeypatch):
    scores = near_ties()
    monkeypatch.setattr(cpu, "TOLERANCE", np.inf)
    _, loose = solve_all(cpu.solve_transposable, scores, 1, 3)
    assert loose.worst_gap > 1e-8
    monkeypatch.undo()
    _, tight = solve_all(cpu.solve_transposable, scores, 1, 3)
    assert tight.worst_gap <= 1e-9
    assert tight.objective >= loose.objective


@pytest.mark.parametrize("m", [4, 16, 32])
@pytest.mark.parametrize("name", ["normal", "integers", "zeros", "sparse"])
def test_repair_is_optimal_from_any_duals(name, m):
    """Nothing about the dual passes is needed for optimality: random column duals only cost more paths."""
    n, rng = m // 2, np.random.default_rng(m)
    for seed in range(5):
        work = workspace(m)
        work.w[:] = hard_scores.make(name, (m, m), seed)
        work.w_columns[:] = work.w.T
        work.u[:], work.v[:] = rng.standard_normal((2, m))
        with compiling():
            assert repair(work, n) >= 0
        kept = work.kept.astype(bool)
        assert (kept.sum(axis=0) == n).all()
        assert (kept.sum(axis=1) == n).all()
        assert np.array_equal(work.kept_columns, work.kept.T)
        assert work.w[kept].sum() == pytest.approx(oracles.best_by_flow(work.w, n), rel=1e-6, abs=1e-300)
        assert reference.excess_of(work.w, kept, work.u, work.v) <= 1e-11
