"""Standard masks on a GPU: those of the reference, bit by bit, whatever the type of the scores."""

import hard_scores
import numpy as np
import pytest
import torch

from tsenor_cli.kernels import reference
from tsenor_cli.kernels.contract import UnusableScoresError

PATTERNS = [(1, 2), (2, 3), (2, 4), (3, 4), (3, 5), (1, 6), (6, 7), (4, 8), (7, 8), (5, 12), (8, 16), (12, 24), (9, 32)]
PATTERNS += [(30, 48), (32, 64), (1, 64), (63, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def solve(scores, n, m, device, **options):
    from tsenor_cli.kernels.gpu.standard import solve_standard

    mask = torch.zeros(scores.shape, dtype=torch.bool, device=device)
    tally = solve_standard(scores.to(device), n, m, mask, **options)()
    return mask.cpu().numpy(), tally


def expected_of(scores, n, m):
    mask = np.empty(scores.shape, np.bool_)
    return mask, reference.solve_standard(scores.double().numpy(), n, m, mask)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_mask_as_the_reference(n, m, dtype, device):
    """All hard scores at once: [11 rows, 3 groups of each]; what overflows in float16 is capped."""
    parts = [hard_scores.make(name, (11, 3 * m), seed=m) for name in hard_scores.ALL]
    scores = torch.from_numpy(np.concatenate(parts, axis=1))
    scores = scores.double().clamp(max=torch.finfo(dtype).max).to(dtype)
    mask, tally = solve(scores, n, m, device)
    expected, expected_tally = expected_of(scores, n, m)
    assert np.array_equal(mask, expected)
    assert tally.objective == pytest.approx(expected_tally.objective, rel=1e-12, abs=0)
    assert tally[1:] == expected_tally[1:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (6, 8)])
def test_signs_do_not_count_in_absolute(n, m, dtype, device):
    scores = torch.randn(32, 8 * m, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask, tally = solve(scores, n, m, device, absolute=True)
    expected, expected_tally = expected_of(scores.abs(), n, m)
    assert np.array_equal(mask, expected)
    assert tally.objective == pytest.approx(expected_tally.objective, rel=1e-12)


def test_more_than_one_program(device):
    """5 programs of 1024 groups, the last one not full."""
    scores = torch.from_numpy(hard_scores.make("quarters", (47, 4 * 100), seed=1))
    mask, tally = solve(scores, 2, 4, device)
    expected, expected_tally = expected_of(scores, 2, 4)
    assert np.array_equal(mask, expected)
    assert tally.objective == pytest.approx(expected_tally.objective, rel=1e-12)


def test_zeros_of_both_signs_are_equal(device):
    mask, _ = solve(torch.tensor([[-0.0, 0.0, -0.0, 0.0]]), 2, 4, device)
    assert mask.tolist() == [[True, True, False, False]]


def test_float64_is_ranked_as_float64(device):
    scores = torch.tensor([[1.0, 1.0 + 1e-12, 0.5, 0.2, 5e-324, 0.0, 1e308, 1e-300]], dtype=torch.float64)
    mask, _ = solve(scores, 1, 4, device)
    assert mask.tolist() == [[False, True, False, False, False, False, True, False]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [4, 5])
def test_unusable_scores(value, dtype, m, device):
    scores = torch.ones(5, 4 * m, dtype=dtype)
    scores[4, 4 * m - 1] = value
    with pytest.raises(UnusableScoresError):
        solve(scores, 2, m, device)
    if np.isfinite(value):
        solve(scores, 2, m, device, absolute=True)
    else:
        with pytest.raises(UnusableScoresError):
            solve(scores, 2, m, device, absolute=True)


def test_no_groups(device):
    mask, tally = solve(torch.empty(0, 16), 4, 8, device)
    assert mask.shape == (0, 16)
    assert tally == (0, 0, 0, 0, 0, 0)
