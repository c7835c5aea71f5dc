"""`tsenor merge`."""

from __future__ import annotations

from pathlib import Path

import click

from tsenor_cli.cli import console
from tsenor_cli.cli.options import fail_if_option, json_option, log_format_option
from tsenor_cli.report.checks import Condition, fail_if


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint at the output.")
@fail_if_option
@json_option
@log_format_option
def merge(output: Path, overwrite: bool, conditions: tuple[Condition, ...], as_json: bool) -> None:
    """Put together OUTPUT from the parts that jobs with `tsenor prune --shard I/N -o OUTPUT` have made.

    All parts have to be there, and of one run: the same model, options and versions. They go when OUTPUT is complete.
    Prints the output directory, or with --json the report.

    \b
    Example: tsenor merge ./llama-2of4
    """
    with console.stdout_reserved():
        console.quiet_libraries(verbose=False)
        from tsenor_cli import pipeline

        report = pipeline.merge(output, overwrite=overwrite)
    console.finished(output, report, in_full=as_json)
    fail_if(conditions, report, str(output))
