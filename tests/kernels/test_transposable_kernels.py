"""Both transposable solvers against judges that know nothing of the method, on scores that are hard.

Objectives are compared with the oracles to 1e-6 relative, block by block; masks with the reference exactly.
"""

import hard_scores
import numpy as np
import oracles
import pytest
import torch

from tsenor_cli.kernels import exact, mend, reference, repair, standard
from tsenor_cli.kernels.compilation import compiled, compiling
from tsenor_cli.kernels.contract import UnusableScoresError
from tsenor_cli.kernels.lanes import pointer
from tsenor_cli.kernels.passes import Schedule
from tsenor_cli.kernels.ties import tie_table
from tsenor_cli.masks import certificate

COMMON = [(1, 4), (2, 4), (3, 4), (2, 8), (4, 8), (4, 16), (8, 16), (8, 32), (16, 32), (32, 64)]
ODD = [(1, 2), (2, 3), (3, 5), (5, 7), (6, 12), (9, 17), (1, 64), (63, 64)]
SOLVERS = pytest.mark.parametrize(
    "solve", [exact.solve_transposable, reference.solve_transposable], ids=["fast", "reference"]
)


READ_AS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}  # kernels/contract.py


def solve_all(solve, scores, n, m, *duals):
    mask = np.empty(scores.shape, np.bool_)
    return mask, solve(scores, n, m, mask, *duals)


def tiles(matrix, m):
    rows, columns = matrix.shape
    return matrix.reshape(rows // m, m, columns // m, m).swapaxes(1, 2).reshape(-1, m, m)


def assert_optimal(scores, mask, tally, n, m, gap=1e-8):
    objective = 0.0
    for block, kept in zip(tiles(scores, m), tiles(mask, m), strict=True):
        assert (kept.sum(axis=0) == n).all()
        assert (kept.sum(axis=1) == n).all()
        value, best = block[kept].sum(dtype=np.float64), oracles.best_by_flow(block, n)
        assert value == pytest.approx(best, rel=1e-6, abs=0)
        objective += value
    assert tally.objective == pytest.approx(objective, rel=1e-12, abs=0)
    assert 0 <= tally.excess <= gap * objective
    assert 0 <= tally.worst_gap <= gap


@pytest.mark.parametrize(("n", "m"), COMMON + ODD)
@pytest.mark.parametrize("name", hard_scores.ALL)
def test_fast_is_optimal(name, n, m):
    scores = hard_scores.make(name, (3 * m, 2 * m), seed=m)
    mask, tally = solve_all(exact.solve_transposable, scores, n, m)
    assert_optimal(scores, mask, tally, n, m)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 5), (2, 8), (8, 16), (8, 32)])
@pytest.mark.parametrize("name", hard_scores.ALL)
def test_reference_is_optimal(name, n, m):
    scores = hard_scores.make(name, (2 * m, m), seed=m)
    mask, tally = solve_all(reference.solve_transposable, scores, n, m)
    assert_optimal(scores, mask, tally, n, m, gap=1e-6)  # its duals are those of scores with tie terms


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", hard_scores.ALL)
def test_enumeration_agrees(name, n):
    scores = hard_scores.make(name, (32, 24))
    mask, _ = solve_all(exact.solve_transposable, scores, n, 4)
    for block, kept in zip(tiles(scores, 4), tiles(mask, 4), strict=True):
        best = oracles.best_by_enumeration(block, n)
        assert block[kept].sum(dtype=np.float64) == pytest.approx(best, rel=1e-6, abs=0)


def test_there_are_90_masks_of_2_4():
    assert len(oracles.all_masks(2, 4)) == 90


@pytest.mark.parametrize(("n", "m"), COMMON + ODD)
@pytest.mark.parametrize("name", hard_scores.ALL)
def test_fast_finds_the_mask_of_the_reference(name, n, m):
    scores = hard_scores.make(name, (2 * m, 3 * m), seed=1)
    mask, tally = solve_all(exact.solve_transposable, scores, n, m)
    expected, expected_tally = solve_all(reference.solve_transposable, scores, n, m)
    assert np.array_equal(mask, expected)
    assert tally.objective == pytest.approx(expected_tally.objective, rel=1e-12)


@SOLVERS
def test_equal_scores_need_no_repair(solve):
    for value in (0.0, 0.3, 1e-40, 3e38):
        _, tally = solve_all(solve, np.full((64, 64), value, np.float32), 8, 16)
        assert tally.objective == pytest.approx(float(np.float32(value)) * 64 * 32, rel=1e-12)
        assert tally.excess <= 1e-8 * tally.objective
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
    mask, _ = solve_all(exact.solve_transposable, scores, 4, 8)
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
    assert (tally.objective, tally.excess, tally.worst_gap, tally.repaired) == (0, 0, 0, 0)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (8, 16), (3, 5)])
@pytest.mark.parametrize("name", ["normal", "integers", "sparse", "bf16"])
def test_a_block_gets_the_same_mask_wherever_it_stands(name, n, m):
    block = hard_scores.make(name, (m, m), seed=3)
    alone, _ = solve_all(exact.solve_transposable, block, n, m)
    neighbours = np.random.default_rng(0).random((4 * m, 11 * m), np.float32)  # 44 blocks: groups reach over row ends
    for row in range(4):
        for column in range(11):
            tile = slice(row * m, (row + 1) * m), slice(column * m, (column + 1) * m)
            scores = neighbours.copy()
            scores[tile] = block
            mask, _ = solve_all(exact.solve_transposable, scores, n, m)
            assert np.array_equal(mask[tile], alone)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 5), (8, 16), (8, 32), (32, 64)])
@pytest.mark.parametrize("name", hard_scores.ALL)
def test_the_way_there_does_not_matter(name, n, m, monkeypatch):
    """One optimum, tied scores included: any number of passes, from any duals, lead to the same mask."""
    scores = hard_scores.make(name, (3 * m, 2 * m), seed=2)
    expected, _ = solve_all(exact.solve_transposable, scores, n, m)
    rng = np.random.default_rng(m)
    for passes in (Schedule(0, 0, 1, 0), Schedule(1, 3, 1, 3), Schedule(2, 1, 3, 9), Schedule(0, 0, 61, 0)):
        monkeypatch.setattr(exact, "schedule", lambda *_, chosen=passes, **__: chosen)
        mask, _ = solve_all(exact.solve_transposable, scores, n, m)
        assert np.array_equal(mask, expected)
        for size in (1, 1e30):
            duals = rng.standard_normal((6, 2, m)) * scores.max() * size
            mask, _ = solve_all(exact.solve_transposable, scores, n, m, duals)
            assert np.array_equal(mask, expected)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (8, 16), (16, 32), (32, 64)])
def test_its_own_duals_are_a_good_start(n, m):
    """Of two arrays of duals that lead to the same mask, only the right one saves work."""
    scores = hard_scores.make("normal", (512, 512))
    duals = np.empty((scores.size // m**2, 2, m))
    _, cold = solve_all(exact.solve_transposable, scores, n, m, None, duals)
    _, warm = solve_all(exact.solve_transposable, scores, n, m, duals)
    _, swapped = solve_all(exact.solve_transposable, scores, n, m, duals[:, ::-1].copy())
    assert warm.repaired < 0.7 * cold.repaired < swapped.repaired
    assert warm.iterations < cold.iterations


@pytest.mark.parametrize(("n", "m"), [(2, 4), (8, 16), (16, 32)])
@pytest.mark.parametrize("name", hard_scores.ALL)
def test_a_transposed_matrix_gets_the_transposed_mask(name, n, m):
    if name in {"identity", "one huge"}:
        pytest.skip("of a block that is its own transpose but for what any mask keeps, two masks are each the other's")
    scores = hard_scores.make(name, (2 * m, 3 * m), seed=4)
    mask, tally = solve_all(exact.solve_transposable, scores, n, m)
    turned, turned_tally = solve_all(exact.solve_transposable, np.ascontiguousarray(scores.T), n, m)
    assert turned_tally.objective == pytest.approx(tally.objective, rel=1e-12)
    assert np.array_equal(turned.T, mask)


@pytest.mark.parametrize("name", hard_scores.ALL)
def test_of_all_optimal_masks_the_one_with_the_largest_tie_terms(name):
    """The rule itself (docs/decisions/0003), by enumeration in integers that no solver has touched."""
    masks = oracles.all_masks(2, 4).reshape(90, 16)
    scores = hard_scores.make(name, (32, 32), seed=5)
    mask, _ = solve_all(exact.solve_transposable, scores, 2, 4)
    for block, kept in zip(tiles(scores, 4), tiles(mask, 4), strict=True):
        w = reference.scaled(block)[0] + tie_table(2, 4)
        sums = masks.astype(np.int64) @ w.reshape(16)
        assert (sums == sums.max()).sum() == 1
        assert np.array_equal(masks[sums.argmax()].reshape(4, 4), kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["normal", "bf16", "integers", "zeros", "denormal"])
def test_dtypes_are_read_as_they_are(dtype, name):
    scores = torch.from_numpy(hard_scores.make(name, (64, 96))).to(dtype)
    raw = scores.view(READ_AS[dtype]) if dtype in READ_AS else scores
    mask, tally = solve_all(exact.solve_transposable, raw.numpy(), 8, 16)
    expected, expected_tally = solve_all(exact.solve_transposable, scores.double().numpy(), 8, 16)
    assert np.array_equal(mask, expected)
    assert tally.objective == pytest.approx(expected_tally.objective, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", ["exact", "standard"])
def test_absolute_values_without_a_copy(dtype, kernel):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    solve = exact.solve_transposable if kernel == "exact" else standard.solve_standard
    results = []
    for scores, absolute in ((weight, True), (weight.abs(), False)):
        raw = scores.view(READ_AS[dtype]) if kernel == "exact" and dtype in READ_AS else scores.float()
        mask = np.empty((64, 96), np.bool_)
        results.append((mask, solve(raw.numpy(), 8, 16, mask, absolute=absolute)))
    assert np.array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("m", [4, 16, 24, 64])
@pytest.mark.parametrize("name", ["normal", "integers", "zeros", "sparse"])
def test_duals_prove_the_mask(name, m):
    scores = hard_scores.make(name, (2 * m, 3 * m))
    duals = np.full((6, 2, m), np.nan)
    mask, tally = solve_all(exact.solve_transposable, scores, m // 2, m, None, duals)
    blocks, masks = (torch.from_numpy(tiles(array, m).copy()) for array in (scores, mask))
    u, v = torch.from_numpy(duals).unbind(1)
    over = certificate.excess(blocks, masks, u, v)
    assert over.sum().item() == pytest.approx(tally.excess, rel=1e-6, abs=1e-12 * tally.objective)
    assert tally.excess <= 1e-9 * tally.objective


@pytest.mark.parametrize(("n", "m"), [(2, 4), (5, 20), (16, 32)])
@pytest.mark.parametrize("name", ["normal", "integers", "zeros", "sparse"])
def test_repair_is_optimal_from_any_duals(name, n, m):
    """Nothing that comes before is needed for optimality: random column duals only cost more paths."""
    rng = np.random.default_rng(m)
    for seed in range(5):
        w = reference.scaled(hard_scores.make(name, (m, m), seed))[0]
        duals = rng.integers(-1 << 50, 1 << 50, m)
        work = repair.workspace(np.dtype(np.float64), np.zeros((m, m), np.int64))
        kept = np.zeros((m, m), np.uint8)
        with compiling():
            assert mend_alone(w.astype(np.float64), kept, duals, n, work) >= 0
        assert (kept.sum(axis=0) == n).all()
        assert (kept.sum(axis=1) == n).all()
        assert w[kept == 1].sum(dtype=np.float64) == pytest.approx(oracles.best_by_flow(w, n), rel=1e-9)


@compiled
def mend_alone(scores, mask, duals, n, workspace):
    """Mend one block of integers afresh, from `duals` of its columns."""
    m, work = len(scores), repair.pointers(workspace)
    for k in range(m):
        work.duals[k] = duals[k]
    return mend.mend(pointer(scores), False, pointer(mask), m, n, m, 1.0, 1.0, True, work)
