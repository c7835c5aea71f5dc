"""solve_mask: any shape, strides and dtype in; the same mask whatever the threads; a certificate that is true."""

import hard_scores
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsenor_cli.errors import InputRefused, UsageError
from tsenor_cli.masks import solve
from tsenor_cli.masks.blocks import from_blocks, to_blocks
from tsenor_cli.masks.invariants import violation
from tsenor_cli.masks.solve import InfeasibleMaskError, solve_mask
from tsenor_cli.specs import NMPattern


def scores_of(name, *shape, seed=0):
    return torch.from_numpy(hard_scores.make(name, (int(np.prod(shape[:-1])), shape[-1]), seed)).reshape(shape)


def kept_sum(scores, mask):
    return torch.where(mask, scores.double(), 0.0).sum().item()


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["2:4", "4:8", "8:16", "16:32", "3:6"])
def test_a_solution_says_what_was_done(text):
    scores = scores_of("normal", 96, 192)
    solution = solve_mask(scores, text)
    pattern = NMPattern.parse(text)
    assert violation(solution.mask, pattern) is None
    assert solution.mask.dtype == torch.bool
    assert solution.mask.shape == scores.shape
    assert solution.objective == pytest.approx(kept_sum(scores, solution.mask), rel=1e-12)
    assert solution.upper_bound >= solution.objective
    assert 0 <= solution.gap <= solution.worst_block_gap + 1e-15 <= 1e-8
    assert solution.solver == "exact"
    assert solution.blocks == 96 * 192 // pattern.m**2
    assert 0 <= solution.repaired <= solution.blocks
    assert solution.seconds > 0


def test_standard():
    scores = scores_of("normal", 5, 24)
    solution = solve_mask(scores, "2:4", transposable=False)
    assert violation(solution.mask, NMPattern(2, 4, transposable=False)) is None
    assert solution.objective == solution.upper_bound == pytest.approx(kept_sum(scores, solution.mask))
    assert (solution.solver, solution.blocks, solution.repaired, solution.gap) == ("top-n", 30, 0, 0.0)
    transposable = solve_mask(scores_of("normal", 8, 24), NMPattern(2, 4))
    assert (
        transposable.objective < solve_mask(scores_of("normal", 8, 24), NMPattern(2, 4, transposable=False)).objective
    )


def test_zeros_have_no_gap():
    solution = solve_mask(torch.zeros(16, 16), "4:8")
    assert (solution.objective, solution.upper_bound, solution.gap, solution.repaired) == (0, 0, 0, 0)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 8, 8), (3, 0, 8)])
@pytest.mark.parametrize("transposable", [True, False])
def test_empty(shape, transposable):
    solution = solve_mask(torch.empty(shape), "4:8", transposable=transposable)
    assert solution.mask.shape == shape
    assert (solution.blocks, solution.gap) == (0, 0)


# --- what goes in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("transposable", [True, False])
def test_every_dtype_is_solved_as_what_it_is(dtype, transposable):
    scores = scores_of("normal", 32, 48).to(dtype)
    solution = solve_mask(scores, "4:8", transposable=transposable)
    expected = solve_mask(scores.float(), "4:8", transposable=transposable)
    assert torch.equal(solution.mask, expected.mask)
    assert solution.objective == expected.objective


VIEWS = {
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second column": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "every second row": lambda x: torch.cat([x, x], -1).view(*x.shape[:-2], -1, x.shape[-1])[..., ::2, :],
    "part of a wider one": lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "unaligned": lambda x: (
        torch.frombuffer(bytearray(b"." + x.numpy().tobytes()), dtype=x.dtype, offset=1).view(x.shape)
        if x.numel()
        else x
    ),
    "expanded": lambda x: x.clone().unsqueeze(0).expand(2, *x.shape)[1],
    "needs grad": lambda x: x.clone().requires_grad_(),
}


@pytest.mark.parametrize("shape", [(32, 48), (3, 16, 48), (2, 3, 16, 24)])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("band", [1 << 24, 1 << 9])
def test_strides_and_bands_do_not_matter(view, shape, band, monkeypatch):
    scores = scores_of("integers", *shape)
    seen = VIEWS[view](scores)
    assert torch.equal(seen, scores)
    expected = [solve_mask(matrix, "4:8") for matrix in scores.reshape(-1, *shape[-2:])]
    monkeypatch.setattr(solve, "BAND_ELEMENTS", band)
    solution = solve_mask(seen, "4:8")
    assert torch.equal(solution.mask.view(-1, *shape[-2:]), torch.stack([one.mask for one in expected]))
    assert solution.objective == pytest.approx(sum(one.objective for one in expected), rel=1e-13)
    assert not solution.mask.requires_grad


@pytest.mark.parametrize("text", ["2:4", "8:16"])
@pytest.mark.parametrize("name", ["normal", "quarters", "sparse"])
@pytest.mark.parametrize("transposable", [True, False])
def test_threads_do_not_matter(text, name, transposable, monkeypatch):
    for module in ("cpu", "standard"):
        monkeypatch.setattr(f"tsenor_cli.kernels.{module}.CHUNK_SCORES", 1 << 12)
    scores, threads = scores_of(name, 256, 512), torch.get_num_threads()
    solutions = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            solutions.append(solve_mask(scores, text, transposable=transposable))
    finally:
        torch.set_num_threads(threads)
    for other in solutions[1:]:
        assert torch.equal(other.mask, solutions[0].mask)
        for field in ("objective", "upper_bound", "worst_block_gap", "repaired"):
            assert getattr(other, field) == getattr(solutions[0], field)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("transposable", [True, False])
def test_non_finite_scores_are_refused(value, transposable):
    scores = torch.ones(64, 64)
    scores[63, 63] = value
    with pytest.raises(InputRefused, match="infinite or not a number"):
        solve_mask(scores, "2:4", transposable=transposable)


@pytest.mark.parametrize("transposable", [True, False])
def test_negative_scores_are_a_mistake_of_the_caller(transposable):
    scores = torch.ones(64, 64)
    scores[1, 2] = -0.5
    with pytest.raises(UsageError, match=r"negative \(down to -0.5\)"):
        solve_mask(scores, "2:4", transposable=transposable)


@pytest.mark.parametrize(
    ("scores", "pattern", "message"),
    [
        (torch.ones(6, 8), "2:4", "2:4 transposable does not divide a 6x8 matrix"),
        (torch.ones(8, 6), NMPattern(2, 4, transposable=False), "2:4 standard does not divide a 8x6 matrix"),
        (torch.ones(8), "2:4", "shape"),
        (torch.ones(8, 8, dtype=torch.int32), "2:4", "torch.int32"),
        (torch.ones(8, 8), "4:4", "not possible"),
        (torch.ones(8, 8), "half", "not of the form"),
    ],
)
def test_requests_that_make_no_sense(scores, pattern, message):
    with pytest.raises(UsageError, match=message):
        solve_mask(scores, pattern)


def test_an_infeasible_mask_never_gets_out(monkeypatch):
    def careless(pattern):
        def kernel(scores, n, m, mask):
            tally = honest(pattern)(scores, n, m, mask)
            mask[5, 7] ^= True
            return tally

        return kernel

    honest = solve._kernel
    monkeypatch.setattr(solve, "_kernel", careless)
    with pytest.raises(InfeasibleMaskError, match="row 5, group 1 keeps"):
        solve_mask(torch.rand(8, 8), "2:4")


# --- laws -------------------------------------------------------------------------------------------------------------

SCORE = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 3.0, 1e-3, 7e-42, 1e20]) | st.floats(0, 2.0**100, width=32)
BLOCK = st.lists(SCORE, min_size=16, max_size=16).map(lambda values: np.array(values, np.float32).reshape(4, 4))
LAWS = settings(max_examples=150, deadline=None, derandomize=True)


@LAWS
@given(BLOCK, st.integers(1, 3))
def test_optimal_and_feasible(block, n):
    solution = solve_mask(torch.from_numpy(block), NMPattern(n, 4))
    assert violation(solution.mask, NMPattern(n, 4)) is None
    best = oracles.best_by_enumeration(block, n)
    assert solution.objective == pytest.approx(best, rel=1e-6, abs=0)
    assert solution.upper_bound >= best * (1 - 1e-12)


@LAWS
@given(BLOCK, st.integers(1, 3), st.permutations(range(4)), st.permutations(range(4)), st.integers(-40, 20))
def test_the_objective_moves_with_the_scores(block, n, rows, columns, exponent):
    def objective(scores):
        return solve_mask(torch.from_numpy(np.ascontiguousarray(scores)), NMPattern(n, 4)).objective

    base = objective(block)
    assert objective(block[rows][:, columns]) == pytest.approx(base, rel=1e-6, abs=0)
    assert objective(block.T) == pytest.approx(base, rel=1e-6, abs=0)
    assert objective(np.ldexp(block.astype(np.float64), exponent)) == pytest.approx(np.ldexp(base, exponent), rel=1e-12)


@LAWS
@given(st.integers(0, 2**32 - 1), st.sampled_from([(4, 8), (3, 7), (8, 16)]))
def test_adding_to_a_row_moves_nothing(seed, pattern):
    """Every mask gains n times what is added to all scores of a row: the best stays the best."""
    n, m = pattern
    block = torch.from_numpy(np.random.default_rng(seed).integers(0, 1000, (m, m)).astype(np.float32))
    base = solve_mask(block, NMPattern(n, m))
    shifted = solve_mask(block + torch.arange(m)[:, None], NMPattern(n, m))
    assert shifted.objective == base.objective + n * m * (m - 1) / 2


def test_worst_block_gap_is_that_of_the_worst_block():
    blocks = torch.rand(6, 8, 8)
    solution = solve_mask(from_blocks(blocks, (16, 24)), "4:8")
    alone = [solve_mask(block, "4:8") for block in to_blocks(from_blocks(blocks, (16, 24)), 8)]
    assert solution.worst_block_gap == max(one.worst_block_gap for one in alone)
