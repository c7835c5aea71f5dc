"""Seconds and gap of every contender on one problem, after a judge that is not ours has confirmed the optimum."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tsenor_cli.bench.contenders import Contender, contenders
from tsenor_cli.errors import CheckFailed, UsageError
from tsenor_cli.masks.baselines import exhaustive, flow, linear_program
from tsenor_cli.masks.blocks import to_blocks
from tsenor_cli.masks.solve import solve_mask
from tsenor_cli.specs import NMPattern

PARITY_TOLERANCE = 1e-6  # relative, of a block's kept sum
PILOT_BLOCKS = 32
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Problem:
    """A matrix of scores to find masks for."""

    name: str
    scores: torch.Tensor  # [out, in], float, finite, ≥ 0, CPU

    def facts(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": list(self.scores.shape),
            "dtype": str(self.scores.dtype).removeprefix("torch."),
        }


@dataclass(frozen=True)
class Measurement:
    """What one contender did on one problem."""

    solver: str
    what: str
    blocks: int  # measured
    seconds: float  # for these, the best of the runs
    runs: int
    seconds_for_all: float  # = seconds, or in proportion to the blocks
    ns_per_score: float
    gap: float | None  # 1 - kept sum / optimum, over the measured blocks; None for a yardstick
    worst_block_gap: float | None
    full_blocks: float | None  # share of the blocks with n in every row and column


@dataclass(frozen=True)
class Parity:
    """That `exact` is optimal, by a judge that knows nothing of it."""

    judge: str
    blocks: int
    worst_shortfall: float  # relative, of any judged block
    certified_gap: float  # of all blocks, by duality


@dataclass(frozen=True)
class Comparison:
    """All contenders on one problem and pattern."""

    problem: dict[str, Any]
    pattern: NMPattern
    parity: Parity
    measurements: list[Measurement]

    def to_dict(self) -> dict[str, Any]:
        return {
            "problem": self.problem,
            "pattern": str(self.pattern),
            "parity": asdict(self.parity),
            "measurements": [asdict(one) for one in self.measurements],
        }


def compare(
    problem: Problem, pattern: NMPattern, names: tuple[str, ...], *, repeat: int, budget_s: float, judged_blocks: int
) -> Comparison:
    """Confirm the optimum, then time all of `names`, in turn, `repeat` times.

    A baseline is measured on as many blocks, evenly spread, as it can do in about `budget_s` seconds.

    Raises:
        CheckFailed: the exact solver is not optimal; nothing has been timed.
    """
    if not pattern.divides(*problem.scores.shape):
        raise UsageError(
            f"{pattern} does not divide {problem.name} {list(problem.scores.shape)}",
            "choose other sizes",
            code="bad-pattern",
        )
    kept, parity = _confirm(problem, pattern, judged_blocks)
    with contenders(names, pattern, torch.get_num_threads()) as taking_part:
        samples = {one.name: _sample(one, problem.scores, pattern, budget_s) for one in taking_part}
        seconds: dict[str, list[float]] = {one.name: [] for one in taking_part}
        masks: dict[str, torch.Tensor | None] = {}
        for turn in range(repeat):  # side by side, so that a noisy minute hits all of them
            for one in taking_part:
                if one.whole or turn == 0:
                    masks[one.name], elapsed = _timed(one, samples[one.name][0], pattern)
                    seconds[one.name].append(elapsed)
    measurements = [
        _measurement(one, seconds[one.name], masks[one.name], *samples[one.name], kept, pattern) for one in taking_part
    ]
    return Comparison(problem.facts(), pattern, parity, measurements)


def _confirm(problem: Problem, pattern: NMPattern, judged_blocks: int) -> tuple[torch.Tensor, Parity]:
    """The kept sum of every block [B] float64, confirmed."""
    solution = solve_mask(problem.scores, pattern)
    kept = _kept(problem.scores, solution.mask, pattern.m)
    chosen = _spread(len(kept), judged_blocks)
    blocks = to_blocks(problem.scores, pattern.m)[chosen].double()
    judge, masks = _judge(blocks, pattern)
    best = torch.where(masks, blocks, 0.0).sum((1, 2))
    shortfall = ((best - kept[chosen]) / best.clamp_min(TINY)).abs().max().item()
    if shortfall > PARITY_TOLERANCE or solution.gap > PARITY_TOLERANCE:
        raise CheckFailed(
            f"{problem.name}, {pattern}: the exact solver is off by {shortfall:.1e} (judged by {judge}), "
            f"with a certified gap of {solution.gap:.1e}; nothing was timed",
            "please report this",
        )
    return kept, Parity(judge, len(chosen), shortfall, solution.gap)


def _judge(blocks: torch.Tensor, pattern: NMPattern) -> tuple[str, torch.Tensor]:
    if pattern.m == 4:
        return "enumeration", exhaustive.solve(blocks, pattern.n)
    try:
        return "min-cost flow (OR-tools)", flow.solve(blocks, pattern.n)
    except UsageError:
        return "linear program (HiGHS)", linear_program.solve_highs(blocks, pattern.n)


def _spread(count: int, most: int) -> torch.Tensor:
    """At most `most` of 0 .. count-1, evenly spread."""
    return torch.arange(min(count, most)) * count // max(1, min(count, most))


def _sample(
    one: Contender, scores: torch.Tensor, pattern: NMPattern, budget_s: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `one` is measured on, [out, in], and the numbers of these blocks."""
    m = pattern.m
    count = scores.numel() // (m * m)
    if one.whole:
        one.solve(scores[:m], pattern)  # compiled, and warm
        return scores, torch.arange(count)
    blocks, size = to_blocks(scores, m), PILOT_BLOCKS
    _timed(one, blocks[_spread(count, size)].reshape(-1, m), pattern)  # imports are paid here
    while True:
        chosen = _spread(count, size)
        sample = scores if len(chosen) == count else blocks[chosen].reshape(-1, m)
        _, elapsed = _timed(one, sample, pattern)
        if len(chosen) == count or elapsed > budget_s / 4:
            return sample, chosen
        size = int(size * min(8, max(2, budget_s / 2 / elapsed)))


def _timed(one: Contender, scores: torch.Tensor, pattern: NMPattern) -> tuple[torch.Tensor | None, float]:
    started = time.perf_counter()
    mask = one.solve(scores, pattern)
    return mask, time.perf_counter() - started


def _measurement(
    one: Contender,
    seconds: list[float],
    mask: torch.Tensor | None,
    scores: torch.Tensor,
    chosen: torch.Tensor,
    optimum: torch.Tensor,
    pattern: NMPattern,
) -> Measurement:
    best = min(seconds)
    gap = worst = full = None
    if mask is not None:
        shortfall, wanted = optimum[chosen] - _kept(scores, mask, pattern.m), optimum[chosen]
        gap = (shortfall.sum() / wanted.sum().clamp_min(TINY)).item()
        worst = (shortfall / wanted.clamp_min(TINY)).max().item()
        tiles = to_blocks(mask, pattern.m)
        full = ((tiles.sum(1) == pattern.n) & (tiles.sum(2) == pattern.n)).all(1).double().mean().item()
    return Measurement(
        solver=one.name,
        what=one.what,
        blocks=len(chosen),
        seconds=best,
        runs=len(seconds),
        seconds_for_all=best * len(optimum) / len(chosen),
        ns_per_score=best / scores.numel() * 1e9,
        gap=gap,
        worst_block_gap=worst,
        full_blocks=full,
    )


def _kept(scores: torch.Tensor, mask: torch.Tensor, m: int) -> torch.Tensor:
    """The kept sum of every block, [B] float64."""
    return torch.where(mask, scores, 0).view(len(scores) // m, m, -1, m).sum((1, 3), dtype=torch.float64).flatten()
