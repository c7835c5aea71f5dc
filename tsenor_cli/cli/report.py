"""`tsenor report`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tsenor_cli.cli import console
from tsenor_cli.cli.options import DIRECTORY, FiniteRange, fail_if_option, json_option, log_format_option
from tsenor_cli.report.checks import Condition, fail_if

if TYPE_CHECKING:
    from tsenor_cli.report.compare import Run

FORMATS = ("html", "table", "markdown", "csv")


@click.command()
@click.argument("directories", nargs=-1, required=True, type=DIRECTORY, metavar="DIRECTORY...")
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="html is a page, table for terminals, markdown for a pull request, csv for spreadsheets.  "
    "[default: html of one, table of several]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="File to write.  [default: standard output; a page goes to DIRECTORY/tsenor-report.html, or to "
    "tsenor-comparison.html in the current directory]",
)
@click.option(
    "--price-per-hour",
    type=FiniteRange(0),
    metavar="PRICE",
    help="Of the machine or its GPU, in any currency: say what each run has cost.",
)
@fail_if_option
@json_option
@log_format_option
def report(
    directories: tuple[str, ...],
    form: str | None,
    output: Path | None,
    price_per_hour: float | None,
    conditions: tuple[Condition, ...],
    as_json: bool,
) -> None:
    """Show what was done to each pruned checkpoint in DIRECTORY..., or compare several of them side by side.

    Reads their tsenor-report.json alone. Prints the path of the page, or the table.

    \b
    Example: tsenor report ./llama-magnitude ./llama-alps --format markdown
    """
    from tsenor_cli.checkpoint.writer import PAGE_FILE
    from tsenor_cli.report.compare import Run
    from tsenor_cli.report.read import read_report

    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        why = "is a directory" if output.is_dir() else "is in no directory that exists"
        raise click.UsageError(f"-o {output} {why}", click.get_current_context())
    if as_json and form is not None:
        raise click.UsageError("--json and --format are two ways to say what to print", click.get_current_context())
    names = _names(directories)
    runs = [
        Run(name, read_report(Path(directory)), price_per_hour)
        for name, directory in zip(names, directories, strict=True)
    ]
    form = "json" if as_json else form or ("html" if len(runs) == 1 else "table")
    text = _rendered(runs, form)
    if output is None and form == "html":
        output = Path(directories[0]) / PAGE_FILE if len(runs) == 1 else Path("tsenor-comparison.html")
    if output is None:
        click.echo(text, nl=False, color=True)  # a table has what the terminal can show
    else:
        _write(output, text)
        console.emit_path(output)
    for run in runs:
        fail_if(conditions, run.report, run.name)


def _names(directories: Sequence[str]) -> list[str]:
    """The last part of each path, or all of it where that would not tell them apart."""
    short = [Path(directory).resolve().name for directory in directories]
    return short if len(set(short)) == len(short) else list(directories)


def _rendered(runs: Sequence[Run], form: str) -> str:
    from tsenor_cli.report import compare

    if form == "html":
        from tsenor_cli.report.page import comparison_page, report_page

        return report_page(runs[0].report, runs[0].price_per_hour) if len(runs) == 1 else comparison_page(runs)
    if form == "json":
        return console.as_json(compare.as_data(runs))
    if form == "table":
        titles, rows = compare.as_rows(runs)
        remarks = "".join(f"{remark}\n" for remark in compare.remarks(runs))
        return console.render_table(*_transposed(titles, rows)) + remarks
    return compare.as_markdown(runs) if form == "markdown" else compare.as_csv(runs)


def _transposed(titles: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A run to a column: a terminal is higher than it is wide."""
    first, *others = zip(titles, *rows, strict=True)
    return list(first), [list(line) for line in others]


def _write(path: Path, text: str) -> None:
    """Nobody ever sees half a file. A link stays one, and a pipe or a device what it is."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
        return
    path = path.resolve()
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(beside, path)  # noqa: PTH105  (like its neighbours)
    finally:
        beside.unlink(missing_ok=True)
