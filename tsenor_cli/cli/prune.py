"""`tsenor prune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsenor_cli.cli import console
from tsenor_cli.cli.dry_run import plan_json, show_plan
from tsenor_cli.cli.options import (
    COUNT,
    DIRECTORY,
    SEED,
    TEXT,
    ClusterType,
    FiniteRange,
    PartType,
    device_option,
    directory_name,
    fail_if_option,
    ignore_option,
    json_option,
    log_format_option,
    memory_budget_option,
    only_option,
    overwrite_option,
    quiet_option,
    resume_option,
    sequence_length_option,
    text_field_option,
    verbose_option,
)
from tsenor_cli.report.checks import Condition, fail_if
from tsenor_cli.report.words import amount, duration, size, tiny
from tsenor_cli.specs import (
    GPU_TYPES,
    METHODS,
    SOLVERS,
    UPDATING,
    CalibrationSpec,
    Choice,
    Cluster,
    NMPattern,
    PruneSpec,
)

if TYPE_CHECKING:
    from tsenor_cli.report.records import Report
    from tsenor_cli.specs import Rule


@click.command()
@click.argument("model", type=DIRECTORY)
@click.option("--nm", metavar="N:M", help="Keep N of every M weights; M from 2 to 64, N below M.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Output directory.  [default: MODEL-NofM-transposable, in the current directory]",
)
@overwrite_option
@resume_option
@click.option(
    "--standard/--transposable",
    default=None,
    help="Row-wise N:M along the input axis only, or rows and columns of every tile.  [default: transposable]",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    help="magnitude needs no text; wanda scores weights by their input; sparsegpt also makes up for what is dropped; "
    "alps does so best and takes longest.  [default: magnitude]",
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="A YAML file: patterns and methods by tensor name. --nm, --standard and --method override it.",
)
@click.option(
    "--calibration",
    "calibration",
    metavar="TEXT",
    type=TEXT,
    help="Text for calibrated methods: .txt, .jsonl, .parquet, - for standard input, or hf:dataset[:config][:split].",
)
@text_field_option("text_field")
@click.option("--samples", type=COUNT, default=128, show_default=True, help="Windows of text to calibrate with.")
@sequence_length_option
@click.option("--seed", type=SEED, default=0, show_default=True, help="Which windows of the text are taken.")
@click.option("--no-update", is_flag=True, help="sparsegpt, alps: take the mask only, leave kept weights as they are.")
@click.option(
    "--damping",
    type=FiniteRange(0),
    default=0.01,
    show_default=True,
    help="sparsegpt, alps: added to the Gram matrix's diagonal, times its mean.",
)
@click.option(
    "--few-tokens",
    type=click.Choice(["magnitude", "error"]),
    default="magnitude",
    show_default=True,
    help="What to do with an expert that saw fewer tokens than it has inputs.",
)
@click.option(
    "--eval",
    "eval_text",
    metavar="TEXT",
    type=TEXT,
    help="Put the perplexity on this text, before and after, into the report.",
)
@memory_budget_option()
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
    type=FiniteRange(0, 1),
    default=0.0,
    show_default=True,
    help="Exit 4 unless at least this share of the prunable parameters is pruned.",
)
@click.option(
    "--allow-nonfinite",
    is_flag=True,
    help="Copy tensors with NaN or infinite weights as they are, instead of refusing the checkpoint.",
)
@click.option(
    "--save-masks",
    is_flag=True,
    help="Save the masks beside the weights, a bit per weight, for fine-tuning: a kept weight may be zero.",
)
@click.option("--strict", is_flag=True, help="Exit 4 if M does not divide a prunable tensor, instead of skipping it.")
@click.option(
    "--shard",
    "part",
    metavar="I/N",
    type=PartType(),
    help="Make part I of N only, some whole shards, in OUTPUT.part-I-of-N: for jobs that know nothing of each other. "
    "tsenor merge puts the parts together.",
)
@click.option(
    "--no-cache-input",
    "stream_input",
    is_flag=True,
    help="Fetch a hub checkpoint shard by shard and keep none of it: two shards of it take space at a time, beside the "
    "output. For magnitude, without --eval.",
)
@fail_if_option
@device_option
@click.option(
    "--fallback",
    is_flag=True,
    help="Let plain torch make the masks on a GPU that a kernel does not compile for: slowly, and not optimal.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show what would be done to each tensor, from headers alone, and how long it would take; write nothing.",
)
@click.option(
    "--plan",
    "cluster",
    metavar="gpus=N,type=T[,nodes=N]",
    type=ClusterType(),
    help=f"With --dry-run: predict for these machines instead of this one. Types: {', '.join(GPU_TYPES)}.",
)
@json_option
@quiet_option
@verbose_option
@log_format_option
def prune(
    model: str,
    output: Path | None,
    nm: str | None,
    standard: bool | None,
    method: str | None,
    recipe: Path | None,
    calibration: str | None,
    text_field: str,
    samples: int,
    sequence_length: int | None,
    seed: int,
    no_update: bool,
    conditions: tuple[Condition, ...],
    dry_run: bool,
    cluster: Cluster | None,
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
    Example: tsenor prune ./llama --nm 2:4 --method alps --calibration text.jsonl
    """
    if options["eval_text"] is None and any(condition.needs_text for condition in conditions):
        raise click.UsageError("--fail-if asks for perplexity: give the text with --eval", click.get_current_context())
    if cluster is not None and not dry_run:
        raise click.UsageError("--plan is for --dry-run", click.get_current_context())
    default, rules = _choices(nm, standard, method, recipe)
    spec = PruneSpec(
        model=model,
        output=output or default_output(model, default.pattern if default else None),
        pattern=default.pattern if default else None,
        method=default.method if default else "magnitude",
        rules=rules,
        calibration=CalibrationSpec(calibration, text_field, samples, sequence_length, seed) if calibration else None,
        update=not no_update,
        eval_field=text_field,
        eval_length=sequence_length,
        **options,
    )
    if spec.methods.isdisjoint(UPDATING) and any(condition.needs_gram for condition in conditions):
        raise click.UsageError("--fail-if asks for the error of outputs: only sparsegpt and alps know it")
    with console.stdout_reserved():
        console.quiet_libraries(verbose=verbose)
        from tsenor_cli import pipeline
        from tsenor_cli.checkpoint.parts import part_directory
        from tsenor_cli.distributed import join_team

        team = join_team()
        quiet = quiet or team.rank > 0  # the first process speaks for all
        if dry_run:
            plan = team.first(lambda: pipeline.plan_prune(spec))
            prediction = team.first(lambda: pipeline.predict(spec, plan, cluster))
        else:
            bar = console.progress(quiet=quiet, verbose=verbose)
            try:
                report = pipeline.prune(spec, bar, team)
            finally:
                bar.close()
            made = part_directory(spec.output, spec.part) if spec.part is not None else spec.output
            if not quiet:
                _show_report(report, made)
    if team.rank > 0:
        return
    if dry_run:
        console.emit(plan_json(plan, prediction)) if as_json else show_plan(plan, prediction)
    else:
        console.finished(made, report, in_full=as_json)
        fail_if(conditions, report, str(made))


def _choices(
    nm: str | None, standard: bool | None, method: str | None, recipe: Path | None
) -> tuple[Choice | None, tuple[Rule, ...]]:
    """What is done to tensors that no rule fits, and the rules."""
    if recipe is not None:
        from tsenor_cli.recipe import load_recipe

        kind = None if standard is None else "standard" if standard else "transposable"
        found = load_recipe(recipe, nm, kind, method)
        return found.default, found.rules
    if nm is None:
        raise click.UsageError("Missing option '--nm'", click.get_current_context())
    return Choice(NMPattern.parse(nm, transposable=not standard), method or "magnitude"), ()


def default_output(model: str, pattern: NMPattern | None) -> Path:
    """A name in the current directory that says what it is: llama-2of4-transposable, llama-sparse by a recipe alone."""
    name = directory_name(model) if Path(model).is_dir() else model.partition("@")[0].rpartition("/")[2]
    return Path(f"{name}-{pattern.n}of{pattern.m}-{pattern.kind}" if pattern else f"{name}-sparse")


def _show_report(report: Report, output: Path) -> None:
    from tsenor_cli.checkpoint.writer import PAGE_FILE

    summary = report.summary
    rows = [
        ("pruned", f"{summary.pruned_tensors} tensors, {amount(summary.pruned_parameters)} parameters"),
        ("coverage", f"{summary.coverage:.2%} of the {amount(summary.prunable_parameters)} prunable"),
        ("kept energy", f"{summary.kept_energy:.2%}")
        if summary.error is None  # updates of weights change what energy means
        else ("output error", f"{summary.error:.2%} on the calibration text"),
        *([("perplexity", _before_and_after(report.perplexity))] if report.perplexity is not None else []),
        ("optimality gap", f"{tiny(summary.gap)} (worst block {tiny(summary.worst_block_gap)})"),
        ("device", _device(report)),
        ("time", duration(summary.seconds)),
        ("peak memory", size(summary.peak_memory_bytes)),
        ("report", str(output / PAGE_FILE)),
    ]
    console.table(("", ""), rows)
    if stopped := [record.name for record in report.tensors if record.status == "max_iterations"]:
        console.note(f"{len(stopped)} tensors have blocks that were stopped at the largest number of iterations")
    if fallbacks := [record.name for record in report.tensors if record.fallbacks]:
        console.note(
            f"experts with too few tokens were pruned by magnitude, in {len(fallbacks)} tensors: {fallbacks[0]} …"
        )
    for reason, names in _reasons(report).items():
        console.note(f"skipped, {reason}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    if report.left_out_files:
        console.note(f"left out, dense weights in another format: {', '.join(report.left_out_files)}")


def _device(report: Report) -> str:
    """Where it ran, and why not on a GPU, if any would have done."""
    from tsenor_cli.device import why_no_gpu

    chosen = report.options["device"] == "auto" and report.device == "cpu"
    return f"{report.device} ({why_no_gpu()})" if chosen else report.device


def _before_and_after(perplexity: dict[str, Any]) -> str:
    before, after = perplexity["before"], perplexity["after"]
    return (
        f"{before['perplexity']:.2f} → {after['perplexity']:.2f} on {before['source']}, {before['tokens']} tokens "
        f"in windows of {before['sequence_length']}, {before['dtype']}"
    )


def _reasons(report: Report) -> dict[str, list[str]]:
    """Why prunable tensors were not pruned; the others (norms, embeddings, …) are only in the report."""
    found: dict[str, list[str]] = {}
    for record in report.tensors:
        if record.prunable and record.reason is not None:
            found.setdefault(record.reason, []).append(record.name)
    return found
