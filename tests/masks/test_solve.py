"""solve_mask: any shape, strides and dtype in; the same mask whatever the threads; a certificate that is true."""

import sys

import hard_scores
import numpy as np
import pytest
import torch

from tsenor_cli.errors import InputRefused, UsageError
from tsenor_cli.kernels import exact
from tsenor_cli.masks import certificate, on_cpu
from tsenor_cli.masks.blocks import from_blocks, to_blocks
from tsenor_cli.masks.invariants import violation
from tsenor_cli.masks.solution import Status
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
    monkeypatch.setattr(on_cpu, "BAND_ELEMENTS", band)
    solution = solve_mask(seen, "4:8")
    assert torch.equal(solution.mask.view(-1, *shape[-2:]), torch.stack([one.mask for one in expected]))
    assert solution.objective == pytest.approx(sum(one.objective for one in expected), rel=1e-13)
    assert not solution.mask.requires_grad


@pytest.mark.parametrize("text", ["2:4", "8:16"])
@pytest.mark.parametrize("name", ["normal", "quarters", "sparse"])
@pytest.mark.parametrize(("transposable", "solver"), [(True, "exact"), (True, "entropic"), (False, "exact")])
def test_threads_do_not_matter(text, name, transposable, solver, monkeypatch):
    for module in ("exact", "entropic", "standard"):
        monkeypatch.setattr(f"tsenor_cli.kernels.{module}.CHUNK_SCORES", 1 << 12)
    scores, threads = scores_of(name, 256, 512), torch.get_num_threads()
    solutions = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            solutions.append(solve_mask(scores, text, transposable=transposable, solver=solver))
    finally:
        torch.set_num_threads(threads)
    for other in solutions[1:]:
        assert torch.equal(other.mask, solutions[0].mask)
        for field in ("objective", "upper_bound", "worst_block_gap", "repaired"):
            assert getattr(other, field) == getattr(solutions[0], field)


@pytest.mark.parametrize(("transposable", "solver"), [(True, "exact"), (True, "entropic"), (False, "exact")])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 5e-5), (torch.float32, 1e-38)])
def test_a_thread_that_takes_denormal_numbers_for_zero_gets_the_same(dtype, size, transposable, solver):
    scores = (scores_of("normal", 64, 128) * size).to(dtype)
    expected = solve_mask(scores, "4:8", transposable=transposable, solver=solver)
    assert torch.set_flush_denormal(True)
    try:
        found = solve_mask(scores, "4:8", transposable=transposable, solver=solver)
        assert sys.float_info.min / 2 == 0, "its own setting is left as it was"
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found.mask, expected.mask)
    assert (found.objective, found.upper_bound) == (expected.objective, expected.upper_bound)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("transposable", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_scores_are_refused(value, transposable, dtype):
    scores = torch.ones(64, 64, dtype=dtype)
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
    def careless(scores, n, m, mask, *duals, **options):
        tally = honest(scores, n, m, mask, *duals, **options)
        mask[5, 7] ^= True
        return tally

    honest = exact.solve_transposable
    monkeypatch.setattr(exact, "solve_transposable", careless)
    with pytest.raises(InfeasibleMaskError, match="row 5, group 1 keeps"):
        solve_mask(torch.rand(8, 8), "2:4")


# --- warm starts, certificates, the other solver ----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["2:4", "8:16", "16:32"])
@pytest.mark.parametrize("name", ["normal", "integers", "sparse"])
def test_a_warm_start_changes_nothing_but_the_work(text, name):
    scores = scores_of(name, 64, 96)
    cold = solve_mask(scores, text, return_duals=True)
    moved = scores * (1 + 0.01 * torch.randn(64, 96, generator=torch.Generator().manual_seed(0))).clamp_min(0)
    expected = solve_mask(moved, text)
    huge = torch.full_like(cold.duals, 1e308)
    for start in (cold, cold.duals, cold.duals.numpy(), torch.zeros_like(cold.duals), 1e6 * cold.duals, huge):
        warm = solve_mask(moved, text, warm_start=start)
        assert torch.equal(warm.mask, expected.mask)
        assert warm.iterations < expected.iterations


@pytest.mark.parametrize("shape", [(32, 48), (3, 16, 48)])
def test_duals_are_those_of_the_blocks_in_order(shape):
    scores = scores_of("normal", *shape)
    solution = solve_mask(scores, "4:8", return_duals=True)
    assert solution.duals.shape == (solution.blocks, 2, 8)
    assert solution.duals.dtype == torch.float64
    blocks, masks = to_blocks(scores, 8), to_blocks(solution.mask, 8)
    bound = certificate.upper_bound(blocks, *solution.duals.unbind(1), 4)
    torch.testing.assert_close(bound, certificate.objective(blocks, masks), rtol=1e-9, atol=0)
    assert bound.sum().item() == pytest.approx(solution.upper_bound, rel=1e-12)
    assert solve_mask(scores, "4:8").duals is None


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_numpy_in_numpy_out(dtype):
    scores = np.random.default_rng(0).random((32, 48)).astype(dtype)
    expected = solve_mask(torch.from_numpy(scores.astype(np.float64)), "4:8", return_duals=True)
    frozen = scores.copy()
    frozen.flags.writeable = False
    records = np.zeros(scores.size, [("other", "u1"), ("score", dtype)])
    records["score"] = scores.ravel()  # whose strides are no multiple of their size
    odd = records["score"].reshape(scores.shape)
    for array in (scores, frozen, np.asfortranarray(scores), scores[::-1, ::-1][::-1, ::-1], odd):
        solution = solve_mask(array, "4:8", return_duals=True)
        assert isinstance(solution.mask, np.ndarray)
        assert isinstance(solution.duals, np.ndarray)
        assert np.array_equal(solution.mask, expected.mask.numpy())


@pytest.mark.parametrize("options", [{}, {"transposable": False}, {"solver": "entropic"}])
def test_absolute(options):
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    solution = solve_mask(weight, "4:8", absolute=True, **options)
    expected = solve_mask(weight.abs(), "4:8", **options)
    assert torch.equal(solution.mask, expected.mask)
    assert solution.objective == expected.objective
    with pytest.raises(UsageError, match="negative"):
        solve_mask(weight, "4:8", **options)


@pytest.mark.parametrize("options", [{}, {"transposable": False}, {"solver": "entropic"}])
def test_a_negative_zero_is_a_zero(options):
    scores = scores_of("sparse", 32, 48)
    negative = torch.where(scores == 0, -0.0, scores)
    solution = solve_mask(negative, "4:8", **options)
    assert torch.equal(solution.mask, solve_mask(scores, "4:8", **options).mask)


def test_entropic():
    scores = scores_of("normal", 64, 96)
    exact, entropic = solve_mask(scores, "8:16"), solve_mask(scores, "8:16", solver="entropic")
    assert violation(entropic.mask, NMPattern(8, 16)) is None
    assert entropic.solver == "entropic"
    assert 0.998 * exact.objective <= entropic.objective <= exact.objective <= entropic.upper_bound
    assert 0 < entropic.gap < 0.003
    short = solve_mask(scores, "8:16", solver="entropic", iterations=10, local_search=1, tau=50)
    assert short.status is Status.MAX_ITERATIONS
    assert short.iterations == 10
    assert exact.status is Status.CONVERGED
    for status in Status:
        assert status.sentence


def test_a_certificate_of_prices_that_are_far_from_good():
    """Nearly no annealing: the terms of one block's certificate add up to more than int64 holds."""
    scores = torch.randint(0, 2, (64, 64), generator=torch.Generator().manual_seed(0)).float()
    found = solve_mask(scores, "32:64", solver="entropic", tau=1e-4)
    best = solve_mask(scores, "32:64").objective
    assert found.objective <= best <= found.upper_bound
    assert found.worst_block_gap == pytest.approx(found.gap)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "greedy"}, "unknown solver"),
        ({"tau": 10.0}, "not an option of the exact solver"),
        ({"iterations": 5, "local_search": 3}, "iterations, local_search: not an option"),
        ({"solver": "entropic", "tau": 0.0}, "tau is 0"),
        ({"solver": "entropic", "tau": float("nan")}, "tau is nan"),
        ({"solver": "entropic", "iterations": 0}, "0 iterations"),
        ({"solver": "entropic", "local_search": -1}, "-1 units"),
        ({"solver": "entropic", "transposable": False}, "for transposable patterns"),
        ({"solver": "entropic", "return_duals": True}, "entropic takes and gives no duals"),
        ({"transposable": False, "warm_start": torch.zeros(4, 2, 4)}, "top-n takes and gives no duals"),
        ({"warm_start": torch.zeros(3, 2, 4)}, r"finite duals of shape \(4, 2, 4\)"),
        ({"warm_start": torch.full((4, 2, 4), float("inf"))}, "finite duals"),
        ({"warm_start": torch.tensor([float("inf"), -float("inf")]).expand(4, 2, 2).repeat(1, 1, 2)}, "finite duals"),
        ({"warm_start": torch.full((4, 2, 4), float("nan"))}, "finite duals"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        solve_mask(torch.rand(8, 8), "2:4", **options)


def test_a_solution_without_duals_is_no_warm_start():
    with pytest.raises(UsageError, match="return_duals"):
        solve_mask(torch.rand(8, 8), "2:4", warm_start=solve_mask(torch.rand(8, 8), "2:4"))


def test_worst_block_gap_is_that_of_the_worst_block():
    blocks = torch.rand(6, 8, 8)
    solution = solve_mask(from_blocks(blocks, (16, 24)), "4:8")
    alone = [solve_mask(block, "4:8") for block in to_blocks(from_blocks(blocks, (16, 24)), 8)]
    assert solution.worst_block_gap == max(one.worst_block_gap for one in alone)


@pytest.mark.parametrize(
    ("scores", "pattern"),
    [
        (torch.empty(4, 4, device="meta"), "2:4"),
        (torch.ones(4, 4).to_sparse(), "2:4"),
        (torch.ones(4, 4), (2, 4)),
        (torch.zeros(4, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "2:4"),
    ],
    ids=["meta", "sparse", "no pattern", "packed"],
)
def test_what_is_no_problem_at_all(scores, pattern):
    with pytest.raises(UsageError):
        solve_mask(scores, pattern)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_is_refused():
    with pytest.raises(UsageError, match="dense"):
        solve_mask(torch.nested.nested_tensor([torch.ones(4, 4)], layout=torch.strided), "2:4")


def test_a_sign_that_torch_has_only_noted():
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        solve_mask(torch._neg_view(weight), "2:4", absolute=True).mask, solve_mask(weight, "2:4", absolute=True).mask
    )


def test_a_device_of_torch():
    assert solve_mask(torch.ones(4, 4), "2:4", device=torch.device("cpu")).objective == 8


def test_a_sum_beyond_float64_is_refused():
    with pytest.raises(InputRefused, match="more than float64 can hold"):
        solve_mask(torch.full((8, 8), 1e308, dtype=torch.float64), "2:4")


@pytest.mark.parametrize("options", [{}, {"transposable": False}, {"solver": "entropic"}])
def test_a_sum_of_chunks_beyond_float64_is_refused(options):
    scores = np.zeros((1024, 1024))
    scores[0, 0] = scores[-1, -1] = 1e308  # neither chunk's sum is
    with pytest.raises(InputRefused, match="more than float64 can hold"):
        solve_mask(scores, "2:4", **options)


def test_a_sum_of_bands_beyond_float64_is_refused(monkeypatch):
    monkeypatch.setattr(on_cpu, "BAND_ELEMENTS", 16)  # the sum of each band alone is finite
    with pytest.raises(InputRefused, match="more than float64 can hold"):
        solve_mask(torch.full((8, 4), 2e307, dtype=torch.float64), "2:4")
