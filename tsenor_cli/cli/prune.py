"""`tsenor prune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsenor_cli.cli import console
from tsenor_cli.cli.options import (
    ignore_option,
    json_option,
    only_option,
    quiet_option,
    standard_option,
    verbose_option,
)
from tsenor_cli.pruners import METHODS
from tsenor_cli.specs import SOLVERS, NMPattern, PruneSpec

if TYPE_CHECKING:
    from tsenor_cli.checkpoint.plan import Plan
    from tsenor_cli.report.records import Report


@click.command()
@click.argument("model")
@click.option("--nm", "nm", required=True, metavar="N:M", help="Keep N of every M weights; M from 2 to 64, N below M.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Output directory.  [default: MODEL-NofM-transposable, in the current directory]",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace an existing checkpoint at the output, once the new one is complete."
)
@standard_option
@click.option("--method", type=click.Choice(METHODS), default="magnitude", show_default=True, help="Pruning method.")
@click.option(
    "--solver",
    type=click.Choice(SOLVERS),
    default="exact",
    show_default=True,
    help="exact: provably optimal masks. entropic: the pipeline of the TSENOR paper.",
)
@click.option("--tau", type=float, help="Entropic: regularisation times the largest score.  [default: per block]")
@click.option("--iterations", type=int, help="Entropic: the most Dykstra iterations of a block.")
@click.option("--local-search", type=int, help="Entropic: the most swaps of the local search in a block.")
@only_option
@ignore_option
@click.option(
    "--min-coverage",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Exit 4 unless at least this share of the prunable parameters is pruned.",
)
@click.option("--strict", is_flag=True, help="Exit 4 if M does not divide a prunable tensor, instead of skipping it.")
@click.option("--device", default="auto", show_default=True, help="Where masks are solved: auto or cpu.")
@click.option(
    "--dry-run", is_flag=True, help="Show what would be done to each tensor, from headers alone; write nothing."
)
@json_option
@quiet_option
@verbose_option
def prune(
    model: str,
    nm: str,
    output: Path | None,
    standard: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,  # noqa: ANN401  (the fields of PruneSpec, under the same names)
) -> None:
    """Prune MODEL, a local checkpoint or a hub id (org/name[@revision]), to N:M sparsity.

    Masks are transposable by default: every M×M tile keeps exactly N weights per row and per column, so W and its
    transpose are both N:M. Tensors keep their dtype; whatever is not pruned is copied byte for byte.
    Prints the output directory, or with --json the report.

    \b
    Example: tsenor prune ./llama --nm 2:4 -o ./llama-sparse
    """
    pattern = NMPattern.parse(nm, transposable=not standard)
    spec = PruneSpec(model=model, output=output or default_output(model, pattern), pattern=pattern, **options)
    with console.stdout_reserved():
        from tsenor_cli import pipeline

        console.quiet_libraries(verbose=verbose)
        if dry_run:
            plan = pipeline.plan_prune(spec)
        else:
            bar = console.ProgressBar(quiet=quiet, verbose=verbose)
            try:
                report = pipeline.prune(spec, bar)
            finally:
                bar.close()
            if not quiet:
                _show_report(report)
    if dry_run:
        console.emit(_plan_json(plan)) if as_json else _show_plan(plan)
    else:
        console.emit({"output": str(spec.output), **report.to_dict()} if as_json else str(spec.output))


def default_output(model: str, pattern: NMPattern) -> Path:
    """A name in the current directory that says what it is: llama-2of4-transposable."""
    name = Path(model).resolve().name if Path(model).is_dir() else model.partition("@")[0].rpartition("/")[2]
    return Path(f"{name}-{pattern.n}of{pattern.m}-{pattern.kind}")


def _show_report(report: Report) -> None:
    summary = report.summary
    rows = [
        ("pruned", f"{summary.pruned_tensors} tensors, {console.count(summary.pruned_parameters)} parameters"),
        ("coverage", f"{summary.coverage:.2%} of the {console.count(summary.prunable_parameters)} prunable"),
        ("kept energy", f"{summary.kept_energy:.2%}"),
        ("optimality gap", f"{summary.gap:.1e} (worst block {summary.worst_block_gap:.1e})"),
        ("time", f"{summary.seconds:.1f} s"),
        ("peak memory", console.size(summary.peak_memory_bytes)),
    ]
    console.table("", ("", ""), rows)
    if stopped := [record.name for record in report.tensors if record.status == "max_iterations"]:
        console.note(f"{len(stopped)} tensors have blocks that were stopped at the largest number of iterations")
    for reason, names in _reasons(report).items():
        console.note(f"skipped, {reason}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    if report.left_out_files:
        console.note(f"left out, dense weights in another format: {', '.join(report.left_out_files)}")


def _reasons(report: Report) -> dict[str, list[str]]:
    """Why prunable tensors were not pruned; the others (norms, embeddings, …) are only in the report."""
    found: dict[str, list[str]] = {}
    for record in report.tensors:
        if record.prunable and record.reason is not None:
            found.setdefault(record.reason, []).append(record.name)
    return found


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "coverage": plan.coverage,
        "pruned_parameters": plan.pruned_parameters,
        "prunable_parameters": plan.prunable_parameters,
        "bytes": plan.checkpoint.nbytes,
        "expected_peak_memory_bytes": plan.peak_bytes,
        "tensors": [
            {
                "name": item.tensor.name,
                "file": item.tensor.path.name,
                "dtype": item.tensor.dtype,
                "shape": list(item.tensor.shape),
                "bytes": item.tensor.nbytes,
                "prunable": item.prunable,
                "layout": item.layout,
                "action": "prune" if item.pruned else "keep",
                "reason": item.reason,
            }
            for item in plan.tensors
        ],
    }


def _show_plan(plan: Plan) -> None:
    rows = [
        (
            item.tensor.name,
            item.tensor.dtype,
            str(list(item.tensor.shape)),
            item.layout or "",
            console.size(item.tensor.nbytes),
            "prune" if item.pruned else f"keep: {item.reason}",
        )
        for item in plan.tensors
    ]
    console.table("", ("tensor", "dtype", "shape", "layout", "bytes", "action"), rows, to_stdout=True)
    console.emit(
        f"{len(plan.pruned)} of {len(plan.tensors)} tensors to {plan.pattern} {plan.pattern.kind}, "
        f"coverage {plan.coverage:.2%}, {console.size(plan.checkpoint.nbytes)} to write, "
        f"peak memory about {console.size(plan.peak_bytes)} above the imports"
    )
