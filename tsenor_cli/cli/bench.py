"""`tsenor bench`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsenor_cli.bench import CONTENDERS, SCORES
from tsenor_cli.cli import console
from tsenor_cli.cli.options import quiet_option, verbose_option
from tsenor_cli.specs import NMPattern, PruneSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from tsenor_cli.bench.measure import Comparison, Problem
    from tsenor_cli.checkpoint.plan import TensorPlan

_DTYPES = ("float32", "bfloat16", "float16", "float64")


@click.group()
def bench() -> None:
    """Measure on this machine what the mask solvers take and give."""


@bench.command()
@click.option("--nm", multiple=True, default=("2:4", "4:8", "8:16", "16:32"), show_default=True, help="Repeatable.")
@click.option("--size", multiple=True, default=("1024x1024",), show_default=True, help="ROWSxCOLUMNS; repeatable.")
@click.option("--scores", type=click.Choice(SCORES), default="normal", show_default=True, help="Random scores.")
@click.option("--dtype", type=click.Choice(_DTYPES), default="float32", show_default=True, help="Of random scores.")
@click.option("--model", help="Take the magnitudes of a checkpoint's prunable weights instead.")
@click.option("--tensors", type=click.IntRange(1), default=4, show_default=True, help="With --model: how many.")
@click.option("--solver", "solvers", multiple=True, type=click.Choice(CONTENDERS), help="Repeatable.  [default: all]")
@click.option(
    "--repeat", type=click.IntRange(1), default=3, show_default=True, help="Runs of the fast ones; best counts."
)
@click.option(
    "--budget", type=click.FloatRange(0.01), default=2.0, show_default=True, help="Seconds for each baseline."
)
@click.option("--judged", type=click.IntRange(1), default=200, show_default=True, help="Blocks judged independently.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random scores.")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw speed against gap: .png, .svg, .pdf."
)
@quiet_option
@verbose_option
def masks(
    nm: tuple[str, ...],
    size: tuple[str, ...],
    model: str | None,
    tensors: int,
    solvers: tuple[str, ...],
    repeat: int,
    budget: float,
    judged: int,
    plot: Path | None,
    quiet: bool,
    verbose: bool,
    **random: Any,  # noqa: ANN401  (what random scores are made of)
) -> None:
    """Compare transposable mask solvers: seconds and gap, ours beside the baselines of the TSENOR paper.

    Before any time is shown, the optimum is confirmed by a solver that is not ours (exit 4 if it is not). Slow
    baselines are measured on as many tiles as they manage in --budget seconds, and their time for all is in
    proportion. A table goes to stderr, one JSON object to stdout.

    \b
    Example: tsenor bench masks --nm 8:16 --size 4096x4096 --plot masks.png > masks.json
    """
    patterns = [NMPattern.parse(text) for text in nm]
    sizes = [_size(text) for text in size]
    with console.stdout_reserved():
        console.quiet_libraries(verbose=verbose)
        problems = _model_problems(model, patterns, tensors) if model else _random_problems(sizes, **random)
        from tsenor_cli.bench.machine import machine
        from tsenor_cli.bench.measure import compare
        from tsenor_cli.bench.plot import save_plot

        comparisons = []
        for problem in problems:
            for pattern in patterns:
                comparison = compare(
                    problem, pattern, solvers or CONTENDERS, repeat=repeat, budget_s=budget, judged_blocks=judged
                )
                comparisons.append(comparison)
                if not quiet:
                    _show(comparison)
        if plot is not None:
            save_plot(comparisons, plot)
    console.emit({"schema_version": 1, "machine": machine(), "comparisons": [one.to_dict() for one in comparisons]})


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if match is None:
        raise click.BadParameter(f"{text!r} is not of the form ROWSxCOLUMNS", param_hint="--size")
    return int(match[1]), int(match[2])


def _random_problems(sizes: Sequence[tuple[int, int]], scores: str, dtype: str, seed: int) -> list[Problem]:
    import torch

    from tsenor_cli.bench.problems import random_problem

    return [random_problem(*size, scores, getattr(torch, dtype), seed) for size in sizes]


def _model_problems(model: str, patterns: list[NMPattern], tensors: int) -> list[Problem]:
    from tsenor_cli import pipeline
    from tsenor_cli.bench.measure import Problem

    plans = [pipeline.plan_prune(PruneSpec(model, Path("unused"), pattern)) for pattern in patterns]
    fitting = set.intersection(*({item.tensor.name for item in plan.pruned} for plan in plans))
    chosen = [item for item in plans[0].pruned if item.tensor.name in fitting]
    if not chosen:
        raise click.UsageError(f"no prunable tensor of {model} fits all of {', '.join(map(str, patterns))}")
    step = max(1, len(chosen) // tensors)  # from all depths of the model
    return [Problem(item.tensor.name, _magnitudes(item)) for item in chosen[::step][:tensors]]


def _magnitudes(item: TensorPlan) -> torch.Tensor:
    from tsenor_cli.checkpoint.layouts import to_matrices

    assert item.layout is not None
    return to_matrices(item.tensor.read(), item.layout).abs().flatten(0, -2).contiguous()


def _no_noise(gap: float) -> float:
    """Rounding is no gap. One below zero can be real: masks that are not full may keep more than a full one."""
    return gap if abs(gap) > 1e-8 else 0.0


def _show(comparison: Comparison) -> None:
    parity = comparison.parity
    exact = next((one for one in comparison.measurements if one.solver == "exact"), None)
    rows = [
        (
            one.solver,
            one.what,
            f"{one.seconds_for_all:.4g} s" + ("" if one.seconds == one.seconds_for_all else " ~"),
            f"{one.ns_per_score:.3g}",
            f"{one.seconds_for_all / exact.seconds:.3g}x" if exact else "",
            "" if one.gap is None else f"{_no_noise(one.gap):.4%}",
            "" if one.worst_block_gap is None else f"{_no_noise(one.worst_block_gap):.2%}",
            "" if one.full_blocks is None else f"{one.full_blocks:.1%}",
        )
        for one in comparison.measurements
    ]
    console.note(f"{comparison.pattern}, {comparison.problem['name']}, {comparison.problem['dtype']}")
    console.table(
        ("solver", "", "time", "ns/score", "of exact", "gap", "worst block", "full blocks"),
        rows,
    )
    console.note(
        f"optimum confirmed on {parity.blocks} blocks by {parity.judge} (off by at most {parity.worst_shortfall:.0e}), "
        f"and by duality on all (gap {parity.certified_gap:.0e}); ~ is in proportion to the blocks measured"
    )
    console.note("")
