"""`tsenor finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsenor_cli.cli import console
from tsenor_cli.cli.options import (
    COUNT,
    DIRECTORY,
    SEED,
    TEXT,
    FiniteRange,
    device_option,
    directory_name,
    fail_if_option,
    json_option,
    log_format_option,
    memory_budget_option,
    overwrite_option,
    quiet_option,
    resume_option,
    sequence_length_option,
    text_field_option,
    verbose_option,
)
from tsenor_cli.report.checks import Condition, fail_if
from tsenor_cli.report.words import amount, duration, size
from tsenor_cli.specs import FinetuneSpec

if TYPE_CHECKING:
    from tsenor_cli.report.records import Report


@click.command()
@click.argument("model", metavar="DIRECTORY", type=DIRECTORY)
@click.option(
    "--text",
    required=True,
    type=TEXT,
    help="What to learn: .txt, .jsonl, .parquet, - for standard input, or hf:dataset[:config][:split].",
)
@text_field_option("field")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Output directory.  [default: DIRECTORY-finetuned]"
)
@overwrite_option
@resume_option
@click.option("--steps", type=COUNT, default=200, show_default=True, help="Steps of AdamW.")
@click.option("--batch-size", type=COUNT, default=8, show_default=True, help="Windows that run at once.")
@click.option("--accumulate", type=COUNT, default=1, show_default=True, help="Batches of a step.")
@sequence_length_option
@click.option(
    "--learning-rate",
    type=FiniteRange(0, min_open=True),
    default=1e-4,
    show_default=True,
    help="The highest: it rises for the first steps, then falls as a cosine to 0.",
)
@click.option(
    "--warmup",
    type=FiniteRange(0, 1),
    default=0.05,
    show_default=True,
    help="The share of the steps in which it rises.",
)
@click.option("--weight-decay", type=FiniteRange(0), default=0.0, show_default=True, help="Of AdamW, in each step.")
@click.option(
    "--clip", type=FiniteRange(0, min_open=True), default=1.0, show_default=True, help="The largest gradient norm."
)
@click.option(
    "--checkpoint-activations", is_flag=True, help="Compute activations twice, to keep fewer of them in memory."
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Which windows are taken, and their order.")
@click.option(
    "--save-every",
    type=COUNT,
    default=50,
    show_default=True,
    help="After so many steps note what --resume needs.",
)
@click.option(
    "--eval",
    "eval_text",
    metavar="TEXT",
    type=TEXT,
    help="Measure perplexity on this text, before and after.  [default: on the end of --text, which is not learned]",
)
@memory_budget_option(
    "Measuring perplexity keeps below this above the imports: hidden states go to disk if they have to."
)
@fail_if_option
@device_option
@json_option
@quiet_option
@verbose_option
@log_format_option
def finetune(
    model: str,
    output: Path | None,
    conditions: tuple[Condition, ...],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,  # noqa: ANN401  (the fields of FinetuneSpec, under the same names)
) -> None:
    """Train the pruned checkpoint in DIRECTORY on a text, its masks kept.

    Weights that were dropped stay zero through every step; the output is verified before it appears, and has the
    shards, names and dtypes of the input. Training is in float32, on a GPU with products in bfloat16, and needs 18
    bytes of memory a parameter. Prints the output directory, or with --json the report.

    \b
    Example: tsenor finetune ./llama-2of4-transposable --text text.jsonl --steps 1000
    """
    if options["eval_text"] == "-" == options["text"]:
        raise click.UsageError("--text and --eval both ask for standard input", click.get_current_context())
    spec = FinetuneSpec(model, output or Path(f"{directory_name(model)}-finetuned"), **options)
    bar = console.progress(quiet=quiet, verbose=verbose)
    with console.stdout_reserved():
        console.quiet_libraries(verbose=verbose)
        from tsenor_cli import pipeline

        try:
            report = pipeline.finetune(spec, bar)
        finally:
            bar.close()
        if not quiet:
            _show(report, spec.output)
    console.finished(spec.output, report, in_full=as_json)
    fail_if(conditions, report, str(spec.output))


def _show(report: Report, output: Path) -> None:
    from tsenor_cli.checkpoint.writer import PAGE_FILE

    assert report.training is not None
    assert report.perplexity is not None
    before, after = report.perplexity["before"], report.perplexity["after"]
    text = "held-out windows of it" if report.training["held_out"] else after["source"]
    learned, losses = report.training["text"], report.training["losses"]
    rows = [
        ("learned", f"{len(losses)} steps, {amount(learned['tokens'])} tokens of {learned['source']}"),
        ("loss", f"{losses[0]:.4f} → {losses[-1]:.4f}"),
        ("perplexity", f"{before['perplexity']:.2f} → {after['perplexity']:.2f} on {text}, {after['tokens']} tokens"),
        ("pattern", f"kept in all {report.summary.pruned_tensors} tensors"),
        ("device", report.device),
        ("time", duration(report.summary.seconds)),
        ("peak memory", size(report.summary.peak_memory_bytes)),
        ("report", str(output / PAGE_FILE)),
    ]
    console.table(("", ""), rows)
