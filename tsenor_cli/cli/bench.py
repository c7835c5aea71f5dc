"""`tsenor bench`."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsenor_cli.bench import CONTENDERS, SCORES
from tsenor_cli.cli import console
from tsenor_cli.cli.options import COUNT, DIRECTORY, SEED, FiniteRange, device_option, quiet_option, verbose_option
from tsenor_cli.specs import NMPattern, PruneSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from tsenor_cli.bench.measure import Comparison, Problem
    from tsenor_cli.bench.training import Milliseconds, ShapeTimes
    from tsenor_cli.checkpoint.plan import TensorPlan

_DTYPES = ("float32", "bfloat16", "float16", "float64")


@click.group()
def bench() -> None:
    """Measure on this machine what the mask solvers take and give, and what sparsity gains in training."""


@bench.command()
@click.option("--nm", multiple=True, default=("2:4", "4:8", "8:16", "16:32"), show_default=True, help="Repeatable.")
@click.option("--size", multiple=True, default=("1024x1024",), show_default=True, help="ROWSxCOLUMNS; repeatable.")
@click.option("--scores", type=click.Choice(SCORES), default="normal", show_default=True, help="Random scores.")
@click.option("--dtype", type=click.Choice(_DTYPES), default="float32", show_default=True, help="Of random scores.")
@click.option("--model", help="Take the magnitudes of a checkpoint's prunable weights instead.")
@click.option("--tensors", type=COUNT, default=4, show_default=True, help="With --model: how many.")
@click.option("--solver", "solvers", multiple=True, type=click.Choice(CONTENDERS), help="Repeatable.  [default: all]")
@click.option("--repeat", type=COUNT, default=3, show_default=True, help="Runs of the fast ones; best counts.")
@click.option("--budget", type=FiniteRange(0.01), default=2.0, show_default=True, help="Seconds for each baseline.")
@click.option("--judged", type=COUNT, default=200, show_default=True, help="Blocks judged independently.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the random scores.")
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
    if plot is not None and not plot.absolute().parent.is_dir():
        raise click.UsageError(f"there is no directory for --plot {plot}", click.get_current_context())
    if plot is not None and plot.suffix not in {".png", ".svg", ".pdf"}:
        raise click.UsageError(
            f"--plot {plot}: give a name that ends in .png, .svg or .pdf", click.get_current_context()
        )
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


@bench.command()
@click.argument("model", type=DIRECTORY, required=False)
@click.option("--size", multiple=True, help="ROWSxCOLUMNS of a weight, repeatable.  [default: a layer of Llama 3.1 8B]")
@click.option("--tokens", type=COUNT, help="In a step.  [default: 8192, or 64 on a CPU]")
@click.option(
    "--dtype", type=click.Choice(("bfloat16", "float16")), default="bfloat16", show_default=True, help="Of all."
)
@device_option
@click.option("--repeat", type=COUNT, default=20, show_default=True, help="Rounds; the median counts.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the random weights and inputs.")
@quiet_option
@verbose_option
def training(
    model: str | None,
    size: tuple[str, ...],
    tokens: int | None,
    dtype: str,
    device: str,
    quiet: bool,
    verbose: bool,
    **rounds: Any,  # noqa: ANN401  (how often, of which random numbers)
) -> None:
    """Time a training step of the linear layers of MODEL: dense, sparse forward only, sparse both ways.

    Sparse forward only is what row-wise 2:4 allows, both ways what a transposable mask does, on torch's kernels for a
    CUDA GPU. Of MODEL only the shapes are taken; weights are random. Before any time is shown, the sparse products are
    held against dense ones (exit 4 if they differ). A table goes to stderr, one JSON object to stdout.

    \b
    Example: tsenor bench training meta-llama/Llama-3.1-8B --tokens 8192 > training.json
    """
    if model and size:
        raise click.UsageError("give MODEL or --size, not both")
    sizes = Counter(_size(text) for text in size)
    with console.stdout_reserved():
        console.quiet_libraries(verbose=verbose)
        import torch

        from tsenor_cli.bench.machine import machine
        from tsenor_cli.bench.training import LLAMA_8B_LAYER, time_shape, total_ms
        from tsenor_cli.device import device_name, find_device

        place = find_device(device)
        counts = _model_shapes(model) if model else sizes or LLAMA_8B_LAYER
        tokens = tokens or (64 if place.type == "cpu" else 8192)
        options = {"tokens": tokens, "dtype": getattr(torch, dtype), "device": place, **rounds}
        times = [time_shape(*one, **options) for one in counts.items()]
        total = total_ms(times)
        if not quiet:
            what = model or ("these sizes" if size else "a layer of Llama 3.1 8B")
            _show_training(times, total, f"{what}, {tokens} tokens, {dtype}, {device_name(place)}")
    console.emit(
        {
            "schema_version": 1,
            "machine": machine() | {"device": device_name(place)},
            "tokens": tokens,
            "dtype": dtype,
            "shapes": [one.to_dict() for one in times],
            "total_ms": total,
        }
    )


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text)
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


def _model_shapes(model: str) -> dict[tuple[int, int], int]:
    """How many matrices of each shape [out, in] 2:4 would prune, experts one by one."""
    from tsenor_cli import pipeline
    from tsenor_cli.checkpoint.layouts import matrix_size

    counts: Counter[tuple[int, int]] = Counter()
    for item in pipeline.plan_prune(PruneSpec(model, Path("unused"), NMPattern(2, 4))).pruned:
        assert item.layout is not None
        out, inputs = matrix_size(item.tensor.shape, item.layout)
        counts[out, inputs] += item.tensor.parameters // (out * inputs)
    if not counts:
        raise click.UsageError(f"no prunable tensor of {model} fits 2:4")
    return counts


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


def _show_training(times: Sequence[ShapeTimes], total: dict[str, float], what: str) -> None:
    rows = []
    for one in times:
        name = f"{one.count} × {one.shape[0]}x{one.shape[1]}"
        for way, took in _WAYS.items():
            milliseconds: Milliseconds | None = getattr(one, took)
            if milliseconds is not None:
                rows.append((name, way, *_columns(milliseconds)))
                name = ""
    console.note(what)
    console.table(("weights", "", "packing", "forward", "backward", "step, ms", "of dense", ""), rows)
    for reason in dict.fromkeys(one.reason for one in times if one.reason):
        shapes = ", ".join(f"{one.shape[0]}x{one.shape[1]}" for one in times if one.reason == reason)
        console.note(f"{shapes}: only dense, as {reason}; sparsity gains nothing there")
    if any(one.both_ways for one in times):
        dense, forward_only, both_ways = total.values()
        console.note(
            f"a step of all {sum(one.count for one in times)} takes {dense:.4g} ms dense, {forward_only:.4g} ms sparse "
            f"forward only ({dense / forward_only:.2f}x) and {both_ways:.4g} ms sparse both ways "
            f"({dense / both_ways:.2f}x), packing included; every product is that of a dense one, within "
            f"{max(one.worst_error or 0 for one in times):.0e} of the largest entry"
        )


_WAYS = {"dense": "dense", "sparse forward only": "forward_only", "sparse both ways": "both_ways"}


def _columns(took: Milliseconds) -> tuple[str, ...]:
    parts = (took.packing, took.forward, took.backward, took.step)
    return (*(f"{part:.3f}" for part in parts), f"{took.speed_up:.2f}x", "nothing gained" if took.speed_up < 1 else "")
