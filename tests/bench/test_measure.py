"""The benchmark shows times only for solvers that are right, and gaps that are true."""

import json

import pytest
import torch

from tsenor_cli.bench import BASELINES, CONTENDERS
from tsenor_cli.bench.measure import Problem, compare
from tsenor_cli.bench.plot import save_plot
from tsenor_cli.bench.problems import random_problem
from tsenor_cli.errors import CheckFailed, TsenorError, UsageError
from tsenor_cli.kernels import exact
from tsenor_cli.masks.baselines import heuristics, plain_torch
from tsenor_cli.masks.blocks import from_blocks, to_blocks
from tsenor_cli.masks.solve import solve_mask
from tsenor_cli.specs import NMPattern

pytestmark = pytest.mark.slow  # starts processes
QUICK = {"repeat": 1, "budget_s": 0.01, "judged_blocks": 20}


@pytest.fixture(scope="module")
def comparison():
    return compare(random_problem(64, 128, "normal", torch.float32, 0), NMPattern(2, 4), CONTENDERS, **QUICK)


def test_everybody_is_there(comparison):
    assert [one.solver for one in comparison.measurements] == list(CONTENDERS)
    for one in comparison.measurements:
        assert one.seconds > 0
        assert one.seconds_for_all == pytest.approx(one.seconds * 512 / one.blocks)
        assert one.ns_per_score == pytest.approx(one.seconds / (one.blocks * 16) * 1e9)
        assert (one.gap is None) == (one.solver == "topk")
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_the_gaps_are_those_of_the_masks(comparison):
    """Computed here from the masks themselves, on all blocks."""
    scores = random_problem(64, 128, "normal", torch.float32, 0).scores
    best = scores[solve_mask(scores, "2:4").mask].sum(dtype=torch.float64)
    measured = {one.solver: one for one in comparison.measurements}
    for name, solve in (("plain-torch", plain_torch.solve), ("bi-nm", heuristics.bi_nm)):
        one, mask = measured[name], from_blocks(solve(to_blocks(scores, 4), 2), scores.shape)
        if one.blocks == 512:
            assert one.gap == pytest.approx(1 - (scores[mask].sum(dtype=torch.float64) / best).item(), abs=1e-9)
    for name in ("exact", "flow", "highs", "exhaustive"):
        assert abs(measured[name].gap) < 1e-9
        assert measured[name].full_blocks == 1
    assert measured["bi-nm"].full_blocks < 0.5
    assert measured["max1000"].gap > 0.001


def test_only_m_4_is_tried_exhaustively():
    problem = random_problem(16, 16, "cubed", torch.bfloat16, 0)
    found = compare(problem, NMPattern(4, 8), ("exact", "exhaustive"), **QUICK)
    assert [one.solver for one in found.measurements] == ["exact"]
    assert found.parity.judge == "min-cost flow (OR-tools)"
    assert found.problem == {"name": "cubed 16x16", "shape": [16, 16], "dtype": "bfloat16"}


def test_a_solver_that_is_not_optimal_is_not_timed(monkeypatch):
    def careless(scores, n, m, mask, *duals, **options):
        """Right, but for a block whose mask is another one's."""
        tally = honest(scores, n, m, mask, *duals, **options)
        mask[:m, :m] = mask[:m, m : 2 * m].copy()
        return tally

    honest = exact.solve_transposable
    monkeypatch.setattr(exact, "solve_transposable", careless)
    problem = random_problem(32, 32, "normal", torch.float32, 0)
    with pytest.raises(CheckFailed, match=r"off by .*nothing was timed"):
        compare(problem, NMPattern(4, 8), ("exact",), repeat=1, budget_s=0.01, judged_blocks=16)


def test_without_or_tools_another_judge_is_found(monkeypatch):
    def missing(*_):
        raise UsageError("ortools is not installed")

    monkeypatch.setattr("tsenor_cli.masks.baselines.flow.solve", missing)
    problem = random_problem(16, 16, "normal", torch.float32, 0)
    assert compare(problem, NMPattern(4, 8), ("exact",), **QUICK).parity.judge == "linear program (HiGHS)"


@pytest.mark.parametrize(
    ("problem", "names", "message"),
    [
        (Problem("odd", torch.rand(6, 8)), ("exact",), "2:4 does not divide odd"),
        (Problem("even", torch.rand(8, 8)), ("nobody",), "unknown solver 'nobody'"),
    ],
)
def test_requests_that_make_no_sense(problem, names, message):
    with pytest.raises(UsageError, match=message):
        compare(problem, NMPattern(2, 4), names, **QUICK)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_picture(comparison, tmp_path, suffix):
    path = tmp_path / f"masks.{suffix}"
    save_plot([comparison], path)
    assert path.stat().st_size > 5000
    if suffix == "svg":
        assert all(f" {name} " in path.read_text() for name in BASELINES)


def test_pictures_that_cannot_be_drawn(comparison, tmp_path):
    with pytest.raises(UsageError, match=r"\.png, \.svg or \.pdf"):
        save_plot([comparison], tmp_path / "masks.jpeg2000")
    with pytest.raises(TsenorError, match="No such file or directory"):
        save_plot([comparison], tmp_path / "missing" / "masks.png")


def test_problems_are_what_they_are_called():
    cubed = random_problem(8, 8, "cubed", torch.float64, 1).scores
    normal = random_problem(8, 8, "normal", torch.float64, 1).scores
    torch.testing.assert_close(cubed, normal**3, rtol=1e-6, atol=0)
    assert torch.equal(normal, random_problem(8, 8, "normal", torch.float64, 1).scores)
    assert not torch.equal(normal, random_problem(8, 8, "normal", torch.float64, 2).scores)
    with pytest.raises(UsageError, match="unknown scores"):
        random_problem(8, 8, "lucky", torch.float32, 0)
