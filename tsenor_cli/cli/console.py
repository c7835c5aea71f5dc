"""What people see while and after a command works: progress bars, tables, notes. All of it on stderr, or asked for.

The only user of rich and tqdm. Results for programs go to stdout through `emit`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from tsenor_cli.observer import Observer

if TYPE_CHECKING:
    from tsenor_cli.checkpoint.plan import Plan


@contextlib.contextmanager
def stdout_reserved() -> Iterator[None]:
    """Whatever a library prints meanwhile goes to stderr: stdout carries nothing but the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def quiet_libraries(*, verbose: bool) -> None:
    """Keep transformers' advice and Python's warnings for -v."""
    if verbose:
        return
    import warnings

    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is first imported


def emit(result: dict[str, Any] | str) -> None:
    """The command's result on stdout: a JSON object, or one line."""
    click.echo(result if isinstance(result, str) else json.dumps(result, indent=1, allow_nan=False))


def note(text: str) -> None:
    """One line for people, on stderr."""
    click.echo(printable(text), err=True)


def printable(text: str) -> str:
    """Names of files and tensors may hold anything; a terminal must not obey them."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, to_stdout: bool = False) -> None:
    """A table for people. `to_stdout` when it is what the user asked for, as with inspect."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(stderr=not to_stdout)
    if not console.is_terminal:  # a pipe has no width to fit into
        console = Console(stderr=not to_stdout, width=200)
    shown = Table(title=title or None, title_justify="left", box=None, show_header=any(columns), header_style="bold")
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(printable(cell)) for cell in row))  # Text: brackets in names are not markup
    console.print(shown)


class ProgressBar(Observer):
    """An observer that draws bytes done; silent where stderr is not a terminal."""

    def __init__(self, *, quiet: bool, verbose: bool = False) -> None:
        self._bar: Any = None
        self._off = True if quiet else None  # None: tqdm decides by whether stderr is a terminal
        self._verbose = verbose
        self._last = ""

    def start(self, total_bytes: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, disable=self._off, file=sys.stderr, leave=False)

    def planned(self, plan: Plan) -> None:
        self.start(sum(item.tensor.nbytes for item in plan.tensors))

    def advanced(self, name: str, nbytes: int) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(name, refresh=False)
            self._bar.update(nbytes)
        if self._verbose and name != self._last:
            note(name)
            self._last = name

    def entered(self, stage: str) -> None:
        if self._bar is not None:
            self._bar.set_description_str(stage)
        if self._verbose:
            note(stage)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def count(number: int) -> str:
    """1234567 → 1.235M."""
    return _scaled(number, 1000, ("", "K", "M", "G", "T"))


def size(nbytes: int) -> str:
    """Bytes for people, in powers of 1024."""
    return _scaled(nbytes, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def _scaled(value: float, step: int, units: Sequence[str]) -> str:
    *smaller, largest = units
    for unit in smaller:
        if value < step:
            return f"{value:.4g}{unit}"
        value /= step
    return f"{value:.4g}{largest}"
