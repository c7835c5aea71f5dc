"""`tsenor eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tsenor_cli.cli import console
from tsenor_cli.cli.options import (
    COUNT,
    DIRECTORY,
    TEXT,
    device_option,
    json_option,
    log_format_option,
    memory_budget_option,
    quiet_option,
    sequence_length_option,
    text_field_option,
    verbose_option,
)

if TYPE_CHECKING:
    from tsenor_cli.calibration.perplexity import Perplexity

WIKITEXT = "hf:Salesforce/wikitext:wikitext-2-raw-v1:test"


@click.command(name="eval")
@click.argument("model", type=DIRECTORY)
@click.option(
    "--text",
    type=TEXT,
    default=WIKITEXT,
    show_default=True,
    help="What to predict: .txt, .jsonl, .parquet, - for standard input, or hf:dataset[:config][:split].",
)
@text_field_option("field")
@click.option(
    "--baseline", metavar="MODEL", type=DIRECTORY, help="Another checkpoint, with the same tokenizer, to compare with."
)
@sequence_length_option
@click.option("--max-windows", type=COUNT, help="Use no more than this many windows of the text.")
@memory_budget_option()
@device_option
@json_option
@quiet_option
@verbose_option
@log_format_option
def evaluate(
    model: str,
    baseline: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,  # noqa: ANN401
) -> None:
    """Measure the perplexity of MODEL, one decoder layer in memory at a time.

    The text is cut into windows that do not overlap; the first token of each is context only. Computed in the
    checkpoint's own dtype, or in float32 on a CPU that has no instructions for it. Prints the figure, or with --json
    what it depends on.

    \b
    Example: tsenor eval ./llama-sparse --text test.txt --baseline ./llama
    """
    bar = console.progress(quiet=quiet, verbose=verbose)
    with console.stdout_reserved():
        from tsenor_cli import pipeline

        console.quiet_libraries(verbose=verbose)
        try:
            models = [model] if baseline is None else [model, baseline]
            results = list(zip(models, pipeline.evaluate(models, observer=bar, **options), strict=True))
        finally:
            bar.close()
    if as_json:
        console.emit(_json(results))
        return
    for name, result in results:
        console.emit(_line(name, result))
    if baseline is not None:
        console.emit(f"ratio {_ratio(results):.4f}")


def _ratio(results: list[tuple[str, Perplexity]]) -> float:
    (_, result), (_, baseline) = results
    return result.perplexity / baseline.perplexity


def _line(model: str, result: Perplexity) -> str:
    tokens = result.tokens
    return (
        f"{result.perplexity:.4f}  {model}: {tokens.source}, {tokens.windows.numel()} tokens in windows of "
        f"{tokens.windows.shape[1]}, tokenizer {tokens.tokenizer_sha256[:12]}, {result.dtype}"
    )


def _json(results: list[tuple[str, Perplexity]]) -> dict[str, Any]:
    model, *baseline = [{"model": name, **result.to_dict()} for name, result in results]
    found = {"schema_version": 1, **model}
    return found | {"baseline": baseline[0], "ratio": _ratio(results)} if baseline else found
