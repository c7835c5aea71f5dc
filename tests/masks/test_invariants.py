"""The feasibility check sees every kind of violation, and nothing else."""

import numpy as np
import pytest
import torch

from tsenor_cli.masks import invariants
from tsenor_cli.masks.invariants import violation
from tsenor_cli.specs import NMPattern

SIZES = [(1, 2), (2, 4), (3, 5), (3, 6), (4, 8), (5, 12), (8, 16), (16, 32), (32, 64), (63, 64), (7, 17), (40, 48)]


@pytest.fixture(params=["compiled", "a stripe a thread", "words"], autouse=True)
def count(request, monkeypatch):
    """Each test with what counts on a CPU, and with what counts on a GPU, which the slow count then confirms."""

    def by_words(mask, n, m, high):
        mask, pattern = torch.from_numpy(mask), NMPattern(n, m, high > 1)
        right = invariants.count_words(mask, pattern)
        assert (right is None) == (m % 4 > 0)
        assert right is None or bool(right) == (invariants._first_violation(mask, pattern) is None)
        return right

    if request.param == "a stripe a thread":
        monkeypatch.setattr("tsenor_cli.kernels.census.CHUNK_ENTRIES", 1)
    if request.param == "words":
        monkeypatch.setattr("tsenor_cli.kernels.census.stripes_are_right", by_words)


def circulant(n, m, tiles_high, tiles_wide):
    """A feasible mask: entry (i, j) is kept if (i + j) mod m < n."""
    rows, columns = np.indices((tiles_high * m, tiles_wide * m))
    return torch.from_numpy((rows + columns) % m < n)


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_a_feasible_mask_passes(n, m):
    mask = circulant(n, m, 2, 3)
    assert violation(mask, NMPattern(n, m)) is None
    assert violation(mask.T, NMPattern(n, m)) is None
    assert violation(mask.unsqueeze(0).expand(3, -1, -1), NMPattern(n, m)) is None
    assert violation(mask[: m + 1], NMPattern(n, m, transposable=False)) is None


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_every_single_flip_is_seen(n, m):
    mask = circulant(n, m, 2, 2)
    rng = np.random.default_rng(0)
    for place in {0, mask.numel() - 1, *rng.integers(mask.numel(), size=30).tolist()}:
        mask.view(-1)[place] ^= True
        row, column = divmod(place, mask.shape[1])
        for transposable in (True, False):
            assert violation(mask, NMPattern(n, m, transposable)).startswith(f"row {row}, group {column // m} keeps")
        mask.view(-1)[place] ^= True


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_right_rows_and_wrong_columns(n, m):
    mask = circulant(n, m, 2, 2)
    mask[m + 1] = mask[m]  # one row twice: its columns are over-full, others under-full
    assert violation(mask, NMPattern(n, m, transposable=False)) is None
    assert "of tile row 1 keeps" in violation(mask, NMPattern(n, m))


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_right_columns_and_wrong_rows(n, m):
    mask = circulant(n, m, 2, 2)
    mask[:, m + 1] = mask[:, m]
    assert violation(mask, NMPattern(n, m)).startswith("row ")


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_sums_that_cancel_are_seen(n, m):
    """Tiles may not borrow from one another: right totals over the whole matrix are not enough."""
    mask = circulant(n, m, 2, 2)
    mask[:m, :m], mask[m:, :m] = False, True
    assert violation(mask, NMPattern(n, m)) is not None
    assert violation(torch.zeros_like(mask), NMPattern(n, m)) is not None
    assert violation(torch.ones_like(mask), NMPattern(n, m)) is not None
