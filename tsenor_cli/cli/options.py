"""Options that several commands share."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from tsenor_cli.errors import UsageError
from tsenor_cli.report.checks import METRICS, Condition
from tsenor_cli.specs import Cluster, Part

Command = Callable[..., Any]
_UNITS = {
    "": 1,
    "B": 1,
    **{unit + suffix: 1024**power for power, unit in enumerate("KMGT", 1) for suffix in ("", "B", "iB")},
}


def directory_name(path: str) -> str:
    """The last part of a path as its user calls it: of `.` that of the directory, and of a link its own."""
    return Path(os.path.normpath(Path.cwd() / path)).name


class Size(click.ParamType[int]):
    """Bytes, in powers of 1024: 500M, 8GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: ANN401
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]?(?:i?B)?)", value)
        if match is None or match[2] not in _UNITS or not 0 < float(match[1]) < math.inf:
            self.fail(f"{value!r} is not a size; give one such as 500M or 8GiB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2]])


class Count(click.IntRange):
    """How many of something: at least so many, and not more than there can be of anything."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: ANN401
        number: int = super().convert(value, param, ctx)
        if number >= 1 << 31:
            self.fail(f"{value} is more than there can be.", param, ctx)
        return number


class FiniteRange(click.FloatRange):
    """A number in a range, and neither infinite nor NaN, which no comparison finds out of one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ANN401
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Directory(click.ParamType[str]):
    """A directory, or a name on the hub: shells complete it as a directory, and what it is is seen later."""

    name = "directory"

    def shell_complete(self, _ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


class Text(click.ParamType[str]):
    """A file of text, or another source of it: completed as a file."""

    name = "text"

    def shell_complete(self, _ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class ConditionType(click.ParamType[Condition]):
    """A bound on a number of the report: perplexity_ratio>1.05."""

    name = "condition"

    def convert(self, value: Any, _param: click.Parameter | None, _ctx: click.Context | None) -> Condition:  # noqa: ANN401
        return value if isinstance(value, Condition) else Condition.parse(value)  # its error has a code of its own

    def shell_complete(self, _ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in METRICS if name.startswith(incomplete)]


class PartType(click.ParamType[Part]):
    """One of several parts: 3/8."""

    name = "part"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Part:  # noqa: ANN401
        try:
            return value if isinstance(value, Part) else Part.parse(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


class ClusterType(click.ParamType[Cluster]):
    """Machines to plan for: gpus=8,type=h200."""

    name = "cluster"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Cluster:  # noqa: ANN401
        try:
            return value if isinstance(value, Cluster) else Cluster.parse(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


DIRECTORY, TEXT = Directory(), Text()
COUNT = Count(1)
SEED = click.IntRange(0, 2**32 - 1)  # what NumPy and torch take


def fail_if_option(command: Command) -> Command:
    return click.option(
        "--fail-if",
        "conditions",
        multiple=True,
        type=ConditionType(),
        help="Exit 4 if this holds of the finished run, such as 'perplexity_ratio>1.05' or 'coverage<0.9'. Repeatable. "
        f"Numbers: {', '.join(METRICS)}.",
    )(command)


def log_format_option(command: Command) -> Command:
    return click.option(
        "--log-format",
        type=click.Choice(("text", "json")),
        default="text",
        show_default=True,
        expose_value=False,  # what is said before the options are understood has to know it (cli/__init__.py)
        help="How to write on standard error: json is one event a line, errors included.",
    )(command)


def json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(command)


def quiet_option(command: Command) -> Command:
    return click.option("-q", "--quiet", is_flag=True, help="No progress, no tables: only the result and errors.")(
        command
    )


def verbose_option(command: Command) -> Command:
    return click.option("-v", "--verbose", is_flag=True, help="Name every tensor, and let libraries speak.")(command)


def standard_option(command: Command) -> Command:
    return click.option(
        "--standard", is_flag=True, help="Row-wise N:M along the input axis only, instead of transposable."
    )(command)


def device_option(command: Command) -> Command:
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        help="Where to compute: cpu, cuda, cuda:1, or auto, which is a GPU if there is one.",
    )(command)


def memory_budget_option(
    text: str = "Keep below this above the imports, such as 8GiB: hidden states go to disk if they have to.",
) -> Callable[[Command], Command]:
    return click.option("--memory-budget", type=Size(), help=text)


def overwrite_option(command: Command) -> Command:
    return click.option(
        "--overwrite", is_flag=True, help="Replace an existing checkpoint at the output, once the new one is complete."
    )(command)


def resume_option(command: Command) -> Command:
    return click.option(
        "--resume/--no-resume",
        default=None,
        help="Go on where an interrupted run stopped, if there was one, or start over.  [default: refuse to choose]",
    )(command)


def sequence_length_option(command: Command) -> Command:
    return click.option(
        "--sequence-length",
        type=Count(2),
        help="Tokens of a window.  [default: the model's maximum, 2048 at most]",
    )(command)


def text_field_option(name: str) -> Callable[[Command], Command]:
    """The option, for a command that calls it `name`."""
    return click.option(
        "--text-field", name, default="text", show_default=True, help="The field of JSON lines and tables that is text."
    )


def only_option(command: Command) -> Command:
    return click.option(
        "--only",
        multiple=True,
        metavar="PATTERN",
        help="Prune only tensors whose name fits: a glob such as '*.mlp.*', or re:REGEX. Repeatable.",
    )(command)


def ignore_option(command: Command) -> Command:
    return click.option(
        "--ignore", multiple=True, metavar="PATTERN", help="Leave these tensors alone; as --only. Repeatable."
    )(command)
