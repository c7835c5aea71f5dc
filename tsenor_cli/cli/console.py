"""What people and their jobs see while and after a command works: progress, tables, notes, events. All on stderr.

The only user of rich and tqdm. Results for programs go to stdout through `emit`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsenor_cli.observer import Observer
from tsenor_cli.report.costs import memory_bytes
from tsenor_cli.report.words import size

if TYPE_CHECKING:
    from tsenor_cli.checkpoint.plan import Plan
    from tsenor_cli.report.records import Report, TensorRecord

_BAR = "{desc}{percentage:3.0f}% {bar:8} {n_fmt}{unit}/{total_fmt}{unit}, {rate_fmt}, {remaining} left{postfix}"
_REFRESH_S = 0.2  # of what is costly to find out
_EVENT_S = 1.0  # between two events of progress


class _Log:
    """How lines on stderr are written: there is one stderr, and --log-format decides for all of it."""

    json = False


def set_log_format(*, as_json: bool) -> None:
    _Log.json = as_json


def event(name: str, **facts: Any) -> None:  # noqa: ANN401
    """One line of JSON on stderr, if that was asked for."""
    if _Log.json:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        click.echo(json.dumps({"time": now, "event": name, **facts}, allow_nan=False), err=True)


def note(text: str) -> None:
    """One line for people, on stderr."""
    if _Log.json:
        event("note", message=text)
    else:
        click.echo(printable(text), err=True)


def error(message: str, exit_code: int, code: str, remedy: str = "", notes: Sequence[str] = ()) -> None:
    """The last line of a command that failed; `notes` say what is left of it."""
    try:
        if _Log.json:
            event("error", message=message, remedy=remedy, notes=notes, code=code, exit_code=exit_code)
        else:
            text = "; ".join([f"{message}: {remedy}" if remedy else message, *notes])
            click.echo(printable(f"tsenor: error: {text} [{code}]"), err=True)
    except OSError:  # nobody can read it; the exit code says it, unless the interpreter's last flush fails, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@contextlib.contextmanager
def stdout_reserved() -> Iterator[None]:
    """Whatever a library prints meanwhile goes to stderr: stdout carries nothing but the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def quiet_libraries(*, verbose: bool) -> None:
    """Keep the advice of libraries and Python's warnings for -v."""
    if verbose:
        return
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would tell where it keeps its list of fonts
    for library in ("TRANSFORMERS", "HF_HUB"):  # read when it is first imported
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def emit(result: dict[str, Any] | str) -> None:
    """The command's result on stdout: a JSON object, or lines; bytes of a path in them that are no text are escaped."""
    if isinstance(result, str):
        click.echo(result.encode(errors="backslashreplace").decode())
    else:
        click.echo(as_json(result), nl=False)


def emit_path(path: Path) -> None:
    """A path as the result, on stdout; one that is no text in the very bytes that it has on disk."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        click.echo(os.fsencode(path))
    else:
        click.echo(str(path))


def finished(output: Path, report: Report, *, in_full: bool) -> None:
    """What a command has made: an event, and on stdout where it is, or all that is to be said of it."""
    event("finished", output=str(output), seconds=report.summary.seconds)
    if in_full:
        emit({"output": str(output), **report.to_dict()})
    else:
        emit_path(output)


def as_json(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=1, allow_nan=False) + "\n"


def printable(text: str) -> str:
    """Names of files and tensors may hold anything; a terminal must not obey them."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, to_stdout: bool = False) -> None:
    """A table for people. `to_stdout` when it is what the user asked for, as with inspect."""
    if to_stdout or not _Log.json:
        click.echo(render_table(columns, rows, to_stdout=to_stdout), err=not to_stdout, nl=False, color=True)


def render_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, to_stdout: bool = True) -> str:
    """The table as text, with colours where the terminal, or NO_COLOR and its kin, have them."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(stderr=not to_stdout)
    if not console.is_terminal:  # a pipe has no width to fit into
        console = Console(stderr=not to_stdout, width=200)
    shown = Table(box=None, show_header=any(columns), header_style="bold")
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(printable(cell)) for cell in row))  # Text: brackets in names are not markup
    with console.capture() as captured:
        console.print(shown)
    return captured.get()


def progress(*, quiet: bool, verbose: bool = False) -> Progress:
    """What tells of a run, as the log format asks for."""
    return EventLog(quiet=quiet) if _Log.json else ProgressBar(quiet=quiet, verbose=verbose)


class Progress(Observer):
    """An observer that ends."""

    def close(self) -> None:
        """No more is coming."""

    def planned(self, plan: Plan) -> None:
        self.began(sum(item.tensor.nbytes for item in plan.tensors))


class ProgressBar(Progress):
    """Draws bytes done; silent where stderr is not a terminal."""

    def __init__(self, *, quiet: bool, verbose: bool) -> None:
        self._bar: Any = None
        self._unit = "B"
        self._off = True if quiet else None  # None: tqdm decides by whether stderr is a terminal
        self._verbose = verbose
        self._last, self._refreshed = "", 0.0

    def began(self, nbytes: int) -> None:
        self._draw(nbytes, "B")

    def _draw(self, total: int, unit: str) -> None:
        from tqdm import tqdm

        self.close()
        self._unit = unit
        self._bar = tqdm(
            total=total,
            unit=unit,
            unit_scale=unit == "B",
            disable=self._off,
            file=sys.stderr,
            leave=False,
            dynamic_ncols=True,
            bar_format=_BAR,
        )

    def advanced(self, name: str, nbytes: int) -> None:
        if self._bar is not None:
            self._tell(name)
            self._bar.update(nbytes)
        if self._verbose and name != self._last:
            note(name)
            self._last = name

    def trained(self, step: int, steps: int, loss: float) -> None:
        if self._unit == "B":
            self._draw(steps, " steps")
        self._bar.set_description_str(f"loss {loss:.4f}  ")
        self._bar.update(step - self._bar.n)

    def entered(self, stage: str) -> None:
        if self._bar is not None:
            self._bar.set_description_str(f"{stage}  ")
        if self._verbose:
            note(stage)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _tell(self, name: str) -> None:
        """Memory, and where in the model the work is."""
        now = time.monotonic()
        if self._bar.disable or now - self._refreshed < _REFRESH_S:
            return
        self._refreshed, memory = now, memory_bytes()
        where = printable(name.removeprefix("model.").removesuffix(".weight"))
        self._bar.set_postfix_str(f"{size(memory)}, {where}" if memory is not None else where, refresh=False)


class EventLog(Progress):
    """Writes events for a job to read."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._done = self._total = 0
        self._told = time.monotonic()

    def began(self, nbytes: int) -> None:
        self._done, self._total = 0, nbytes

    def planned(self, plan: Plan) -> None:
        super().planned(plan)
        self._event("planned", tensors=len(plan.tensors), to_prune=len(plan.pruned), coverage=plan.coverage)

    def advanced(self, name: str, nbytes: int) -> None:
        self._done += nbytes
        if time.monotonic() - self._told > _EVENT_S:
            self._event("progress", tensor=name)

    def pruned(self, record: TensorRecord) -> None:
        facts = ("pattern", "transposable", "method", "kept_energy", "error", "gap", "seconds")
        self._event("pruned", tensor=record.name, **{name: getattr(record, name) for name in facts})

    def trained(self, step: int, steps: int, loss: float) -> None:
        if time.monotonic() - self._told > _EVENT_S or step == steps:
            self._event("step", step=step, steps=steps, loss=loss)

    def entered(self, stage: str) -> None:
        self._event("stage", stage=stage)

    def _event(self, name: str, **facts: Any) -> None:  # noqa: ANN401
        self._told = time.monotonic()
        if not self._quiet:
            event(name, **facts, done_bytes=self._done, total_bytes=self._total, memory_bytes=memory_bytes())
