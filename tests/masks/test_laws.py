"""What must hold of every exact mask, on ten thousand cases that hypothesis chooses (five laws of 2,000 each).

The scores are hard ones by name and seed, or a tile of a few values that tie and differ in every way; the same in every
run, so that a failure can be seen again.
"""

import hard_scores
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsenor_cli.masks.invariants import violation
from tsenor_cli.masks.solve import solve_mask
from tsenor_cli.specs import NMPattern

CASES = 2000
LAW = settings(max_examples=CASES, deadline=None, derandomize=True, database=None)
pytestmark = pytest.mark.slow

VALUE = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 3.0, 1e-3, 7e-42, 1e20]) | st.floats(0, 2.0**100, width=32)
TILE = st.lists(VALUE, min_size=16, max_size=16).map(lambda values: np.array(values, np.float32).reshape(4, 4))
PATTERN = st.sampled_from([(1, 4), (2, 4), (3, 4), (1, 2), (3, 5), (2, 8), (4, 8), (8, 16), (9, 17), (16, 32)])


@st.composite
def problems(draw):
    """(pattern, one tile of scores)."""
    n, m = draw(PATTERN)
    if m == 4 and draw(st.booleans()):
        return NMPattern(n, m), draw(TILE)
    name, seed = draw(st.sampled_from(sorted(hard_scores.ALL))), draw(st.integers(0))
    return NMPattern(n, m), hard_scores.make(name, (m, m), seed)


def solve(scores, pattern, **options):
    return solve_mask(torch.from_numpy(np.ascontiguousarray(scores)), pattern, **options)


@LAW
@given(problems())
def test_feasible_and_optimal(problem):
    pattern, scores = problem
    solution = solve(scores, pattern)
    assert violation(solution.mask, pattern) is None
    judge = oracles.best_by_enumeration if pattern.m == 4 else oracles.best_by_flow
    best = judge(scores, pattern.n)
    assert solution.objective == pytest.approx(best, rel=1e-6, abs=0)
    assert solution.upper_bound >= best * (1 - 1e-9)
    assert solution.gap <= 1e-8


@LAW
@given(problems(), st.randoms(use_true_random=False))
def test_rows_and_columns_may_be_permuted(problem, random):
    pattern, scores = problem
    rows, columns = (random.sample(range(pattern.m), pattern.m) for _ in range(2))
    solution, permuted = solve(scores, pattern), solve(scores[rows][:, columns], pattern)
    assert permuted.objective == pytest.approx(solution.objective, rel=1e-6, abs=0)
    turned = solve(scores.T, pattern)
    assert turned.objective == pytest.approx(solution.objective, rel=1e-6, abs=0)


@LAW
@given(problems(), st.integers(-60, 60), st.floats(1e-3, 1e3))
def test_scores_may_be_scaled(problem, exponent, factor):
    """By a power of two without any change; by anything with the same objective."""
    pattern, scores = problem
    exactly = scores.astype(np.float64)
    solution, scaled = solve(exactly, pattern), solve(np.ldexp(exactly, exponent), pattern)
    assert torch.equal(scaled.mask, solution.mask)
    assert scaled.objective == np.ldexp(solution.objective, exponent)
    assert solve(exactly * factor, pattern).objective == pytest.approx(solution.objective * factor, rel=1e-6)


@LAW
@given(problems())
def test_a_pruned_block_stays_as_it_is(problem):
    """Idempotence: every positive kept score is kept again, so the weights do not change a second time."""
    pattern, scores = problem
    solution = solve(scores, pattern)
    pruned = np.where(solution.mask.numpy(), scores, 0)
    again = solve(pruned, pattern)
    assert np.array_equal(np.where(again.mask.numpy(), pruned, 0), pruned)


@LAW
@given(problems(), st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 9))
def test_the_mask_is_that_of_the_scores_alone(problem, seed, high, wide):
    """Neither the other blocks, nor the place, the float type, the warm start or the strides change it."""
    pattern, scores = problem
    m, rng = pattern.m, np.random.default_rng(seed)
    expected = solve(scores, pattern).mask
    matrix = rng.random((high * m, wide * m)) * scores.max()
    row, column = rng.integers(high), rng.integers(wide)
    tile = slice(row * m, (row + 1) * m), slice(column * m, (column + 1) * m)
    matrix[tile] = scores
    duals = rng.standard_normal((high * wide, 2, m)) * scores.max()
    solution = solve_mask(np.asfortranarray(matrix), pattern, warm_start=duals)
    assert np.array_equal(solution.mask[tile], expected.numpy())
