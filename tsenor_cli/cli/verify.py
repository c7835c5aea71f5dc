"""`tsenor verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from tsenor_cli.cli import console
from tsenor_cli.cli.options import (
    DIRECTORY,
    json_option,
    log_format_option,
    quiet_option,
    standard_option,
    verbose_option,
)
from tsenor_cli.specs import NMPattern

if TYPE_CHECKING:
    from tsenor_cli.checkpoint.verifier import Verification

_SHOWN = 10


@click.command()
@click.argument("directory", type=DIRECTORY)
@click.option("--nm", metavar="N:M", help="The pattern to check for.  [default: what the checkpoint's report claims]")
@standard_option
@click.option(
    "--against",
    metavar="ORIGINAL",
    type=DIRECTORY,
    help="The dense original: what was not pruned must be identical to it.",
)
@json_option
@quiet_option
@verbose_option
@log_format_option
@click.pass_context
def verify(
    context: click.Context,
    directory: str,
    nm: str | None,
    standard: bool,
    against: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Check the pruned checkpoint in DIRECTORY from its files alone; exit 4 with the first places that fail.

    Every group of M in every pruned tensor and saved mask, negative zeros, values that are not finite; with --against
    also that every other tensor and file is bit-identical and every kept weight unchanged (after tsenor finetune: that
    shapes and dtypes are the same).

    \b
    Example: tsenor verify ./llama-2of4-transposable --against ./llama
    """
    if nm is None and standard:
        raise click.UsageError("--standard needs --nm: without it the report says what to check", context)
    pattern = NMPattern.parse(nm, transposable=not standard) if nm is not None else None
    bar = console.progress(quiet=quiet, verbose=verbose)
    with console.stdout_reserved():
        from tsenor_cli import pipeline

        console.quiet_libraries(verbose=verbose)
        try:
            result = pipeline.verify(directory, pattern, against, bar)
        finally:
            bar.close()
    if as_json:
        console.emit(result.to_dict())
    elif result.ok:
        console.emit(_summary(result))
    for failure in result.failures[:_SHOWN]:
        console.note(f"{failure.where!r}: {failure.what}" + (f" ({failure.count} places)" if failure.count > 1 else ""))
    if not result.ok:
        from tsenor_cli.errors import CheckFailed

        raise CheckFailed(
            f"{directory} is not {result.pattern} {result.kind}: {len(result.failures)} checks failed",
            code="verify-failed",
        )


def _summary(result: Verification) -> str:
    groups = sum(tensor.groups for tensor in result.tensors)
    exact = "exactly" if all(tensor.exact for tensor in result.tensors) else "at most"
    kept = "N" if "," in result.pattern else result.pattern.partition(":")[0]
    text = f"{result.directory}: {len(result.tensors)} tensors are {result.pattern} {result.kind}"
    text += f", {exact} {kept} nonzeros in each of {groups:,} groups"
    if any(tensor.masked for tensor in result.tensors):
        text += "; the saved masks agree"
    if result.against is None:
        return text
    rest = "fine-tuned, in the shapes of" if result.trained else "the rest is identical to"
    return f"{text}; {rest} {result.against}"
