"""Standard masks: the n largest of every group, lower index first among equals."""

import hard_scores
import numpy as np
import oracles
import pytest

from tsenor_cli.kernels import reference, standard
from tsenor_cli.kernels.contract import UnusableScoresError


def solve_all(solve, scores, n, m):
    mask = np.empty(scores.shape, np.bool_)
    return mask, solve(scores, n, m, mask)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 5), (4, 8), (8, 16), (12, 24), (32, 64), (63, 64)])
@pytest.mark.parametrize("name", hard_scores.ALL)
def test_same_mask_as_the_reference(name, n, m):
    scores = hard_scores.make(name, (7, 3 * m))  # 21 groups: the last batch of lanes is not full
    mask, tally = solve_all(standard.solve_standard, scores, n, m)
    expected, _ = solve_all(reference.solve_standard, scores, n, m)
    assert np.array_equal(mask, expected)
    best = sum(oracles.best_of_group(group, n) for group in scores.reshape(-1, m))
    assert tally.objective == pytest.approx(best, rel=1e-12, abs=0)


@pytest.mark.parametrize("solve", [standard.solve_standard, reference.solve_standard], ids=["cpu", "ref"])
def test_the_lower_index_wins(solve):
    mask, _ = solve_all(solve, np.array([[1, 2, 2, 2, 0, 0, 0, 0]], np.float32), 2, 4)
    assert mask.tolist() == [[False, True, True, False, True, True, False, False]]


@pytest.mark.parametrize("solve", [standard.solve_standard, reference.solve_standard], ids=["cpu", "ref"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_unusable_scores(solve, value):
    scores = np.ones((5, 20), np.float32)
    scores[4, 19] = value
    with pytest.raises(UnusableScoresError):
        solve_all(solve, scores, 2, 4)


def test_float64_is_ranked_as_float64():
    scores = np.array([[1.0, 1.0 + 1e-12, 0.5, 0.2]])
    mask, _ = solve_all(standard.solve_standard, scores, 1, 4)
    assert mask.tolist() == [[False, True, False, False]]
