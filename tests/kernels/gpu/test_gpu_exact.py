"""The exact GPU solver against the reference, bit by bit, and an oracle that knows nothing of the method.

Without a GPU the kernels run in Triton's interpreter, which takes as long for one block as for all blocks of a program:
so blocks of all kinds stand side by side in one matrix.
"""

import hard_scores
import numpy as np
import oracles
import pytest
import torch

from tsenor_cli.kernels import reference
from tsenor_cli.kernels.contract import UnusableScoresError
from tsenor_cli.kernels.gpu import exact, settle_kernel
from tsenor_cli.kernels.gpu.exact_variants import settle_variants, variants
from tsenor_cli.masks import certificate

SMALL = [(1, 2), (2, 3), (2, 4), (3, 5)]
SMALL += [
    pytest.param(*pattern, marks=pytest.mark.slow)
    for pattern in [(1, 3), (1, 4), (3, 4), (5, 6), (2, 7), (1, 8), (4, 8), (7, 8)]
]
SLOW = {"sums of lines", "sparse", "identity", "scaled lines"}  # many paths: as large as these may be in small blocks
NOT_SLOW = set(hard_scores.ALL) - SLOW
LARGE = [
    (5, 12, NOT_SLOW),
    (8, 16, NOT_SLOW),
    (15, 24, {"bf16"}),
    (16, 32, {"normal", "quarters"}),
    (12, 48, {"bf16"}),
    (32, 64, {"bf16"}),
    (1, 64, {"zeros"}),
]


def every_kind(m, names=frozenset(hard_scores.ALL), seed=1):
    """One block of each kind, float32 [m, kinds * m]."""
    return np.concatenate([hard_scores.make(name, (m, m), seed) for name in sorted(names)], axis=1)


def tiles(matrix, m):
    rows, columns = matrix.shape
    return matrix.reshape(rows // m, m, columns // m, m).swapaxes(1, 2).reshape(-1, m, m)


def solve(scores, n, m, device, **options):
    """`scores` is a tensor or an array; returns the mask as an array, and the tally."""
    scores = torch.as_tensor(scores).to(device)
    mask = torch.empty(scores.shape, dtype=torch.bool, device=device)
    mask.view(torch.uint8).fill_(2)  # what no kernel writes
    tally = exact.solve_transposable(scores, n, m, mask, **options)()
    return mask.view(torch.uint8).cpu().numpy(), tally


def expect(scores, n, m):
    scores = np.asarray(scores)
    mask = np.empty(scores.shape, np.bool_)
    return mask, reference.solve_transposable(scores, n, m, mask)


def assert_is_that_of_the_reference(scores, n, m, device, **options):
    mask, tally = solve(scores, n, m, device, **options)
    expected, expected_tally = expect(scores, n, m)
    assert np.array_equal(mask, expected)
    assert tally.objective == pytest.approx(expected_tally.objective, rel=1e-12, abs=0)
    assert 0 <= tally.excess <= 1e-8 * tally.objective
    assert 0 <= tally.worst_gap <= 1e-8
    return tally


def assert_no_oracle_is_better(scores, n, m, device):
    mask, _ = solve(scores, n, m, device)
    for block, kept in zip(tiles(scores, m), tiles(mask == 1, m), strict=True):
        assert (kept.sum(axis=0) == n).all()
        assert (kept.sum(axis=1) == n).all()
        assert block[kept].sum(dtype=np.float64) == pytest.approx(oracles.best_by_highs(block, n), rel=1e-6, abs=0)


@pytest.mark.parametrize(("n", "m"), SMALL)
def test_small_blocks(n, m, device):
    assert_is_that_of_the_reference(every_kind(m), n, m, device)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m", "names"), LARGE, ids=lambda value: str(value) if isinstance(value, int) else "")
def test_large_blocks(n, m, names, device):
    assert_is_that_of_the_reference(every_kind(m, names), n, m, device)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_no_oracle_is_better(n, m, device):
    assert_no_oracle_is_better(every_kind(m, seed=2), n, m, device)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 4), (2, 6)])
def test_blocks_are_found_where_they_are(n, m, device):
    """More than a program holds, in several rows of blocks."""
    scores = hard_scores.make("bf16", (6 * m, 23 * m), seed=3)
    assert_is_that_of_the_reference(scores, n, m, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_dtypes_are_read_as_they_are(n, m, dtype, device):
    names = ["normal", "bf16", "integers", "zeros", "denormal"]
    scores = torch.from_numpy(every_kind(m, names)).to(dtype)
    mask, tally = solve(scores, n, m, device)
    expected, expected_tally = expect(scores.double(), n, m)
    assert np.array_equal(mask, expected)
    assert tally.objective == pytest.approx(expected_tally.objective, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (2, 5)])
def test_all_bits_of_float64_count(n, m, device):
    """Beyond float32, blocks of any size beside each other, and differences below its precision."""
    rng = np.random.default_rng(0)
    sizes = np.repeat([1e-308, 1e-300, 1e-60, 1.0, 1e60, 1e300, 1e305, 5e-324], m)
    close = 1.0 + rng.random((m, 8 * m)) * 1e-13
    scores = np.concatenate([rng.random((m, 8 * m)) * sizes, close * np.maximum(sizes, 1e-300)], axis=1)
    mask, _ = solve(scores, n, m, device)
    assert np.array_equal(mask, expect(scores, n, m)[0])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-3, 1e30])
def test_any_duals_lead_to_the_same_mask(size, device):
    scores = every_kind(8, NOT_SLOW)
    warm = torch.from_numpy(np.random.default_rng(0).standard_normal((len(NOT_SLOW), 2, 8)) * size).to(device)
    mask, _ = solve(scores, 4, 8, device, warm=warm)
    assert np.array_equal(mask, expect(scores, 4, 8)[0])


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 7), (4, 8)])
def test_duals_prove_the_mask_and_are_a_good_start(n, m, device):
    scores = every_kind(m, NOT_SLOW | {"sparse"})
    duals = torch.full((len(NOT_SLOW) + 1, 2, m), torch.nan, dtype=torch.float64, device=device)
    mask, tally = solve(scores, n, m, device, duals=duals)
    assert np.array_equal(mask, expect(scores, n, m)[0])
    blocks, masks = (torch.from_numpy(tiles(array, m).copy()) for array in (scores, mask == 1))
    over = certificate.excess(blocks, masks, *duals.cpu().unbind(1))
    assert over.sum().item() == pytest.approx(tally.excess, rel=1e-6, abs=1e-12 * tally.objective)
    again, _ = solve(scores, n, m, device, warm=duals)
    assert np.array_equal(again, mask)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(3, 6), (4, 8)])
def test_settling_is_right_from_any_mask_and_prices(n, m, device):
    """Nothing that the first kernel does is needed for optimality, but that rows hold n."""
    rng = np.random.default_rng(m)
    scores = every_kind(m, set(hard_scores.ALL) - {"sums of lines"})
    blocks = scores.shape[1] // m
    rows = rng.permuted(np.tile(np.arange(m) < n, (m * blocks, 1)), axis=1).reshape(blocks, m, m)
    mask = torch.from_numpy(np.ascontiguousarray(rows.swapaxes(0, 1).reshape(m, -1))).to(device)
    shared = {
        "scores": torch.from_numpy(scores).to(device),
        "mask": mask.view(torch.uint8),
        "ties": exact.padded_ties(n, m, 8, device),
        "per_row": blocks,
        "stride": scores.shape[1],
        "n": n,
    }
    prices = torch.from_numpy(rng.integers(-(1 << 27), 1 << 27, (blocks, 8)).astype(np.int32)).to(device)
    objective = torch.empty(blocks, dtype=torch.float64, device=device)
    queue = torch.cat([torch.arange(blocks), torch.full((70,), settle_kernel.NOBODY.value)]).to(device)
    state = torch.ones(blocks, dtype=torch.int32, device=device)
    both = settle_variants(m, "fp32", 32)
    tally = exact.settle_queue(shared, queue, state, prices, objective, objective, 1000, both)()
    expected, expected_tally = expect(scores, n, m)
    assert np.array_equal(mask.cpu().numpy(), expected)
    assert tally.objective == pytest.approx(expected_tally.objective, rel=1e-12)


def test_running_out_of_sweeps_is_an_error(device, monkeypatch):
    monkeypatch.setattr(exact, "SWEEPS_PER_LINE", 0)
    with pytest.raises(RuntimeError, match="please report"):
        solve(every_kind(8, {"sums of lines", "normal"}), 4, 8, device)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_absolute_values_without_a_copy(n, m, device):
    weight = torch.randn(m, 6 * m, generator=torch.Generator().manual_seed(0))
    mask, tally = solve(weight, n, m, device, absolute=True)
    expected, expected_tally = solve(weight.abs(), n, m, device)
    assert np.array_equal(mask, expected)
    assert tally == expected_tally


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0, -1e-45])
@pytest.mark.parametrize(
    ("n", "m", "place"),
    [(2, 4, 127), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 4, 0), (1, 3, 80), (4, 8, 127)])],
)
def test_unusable_scores(n, m, place, value, device):
    scores = np.ones((m, 32 if m != 3 else 27), np.float32)
    scores.reshape(-1)[place] = value
    with pytest.raises(UnusableScoresError):
        solve(scores, n, m, device)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_unusable_absolute_values(value, device):
    scores = np.full((8, 8), -1.0, np.float32)
    scores[3, 5] = value
    for n, m in ((2, 4), (4, 8)):
        with pytest.raises(UnusableScoresError):
            solve(scores, n, m, device, absolute=True)


@pytest.mark.parametrize("m", [4, 8])
def test_masks_may_begin_anywhere_in_memory(m, device):
    scores = torch.from_numpy(every_kind(m, {"normal", "bf16"})).to(device)
    room = torch.empty(scores.numel() + 1, dtype=torch.bool, device=device)
    mask = room[1:].view(scores.shape)
    exact.solve_transposable(scores, m // 2, m, mask)
    assert np.array_equal(mask.cpu().numpy(), expect(scores.cpu(), m // 2, m)[0])


@pytest.mark.parametrize("m", [2, 4, 7, 8, 16, 24, 32, 64])
def test_variants_name_all_arguments(m):
    for variant in variants(m, m // 2, "bf16"):
        assert set(variant.signature) | set(variant.constants) == set(variant.kernel.arg_names)
