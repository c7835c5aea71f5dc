"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click

Command = Callable[..., Any]
_UNITS = {
    "": 1,
    "B": 1,
    **{unit + suffix: 1024**power for power, unit in enumerate("KMGT", 1) for suffix in ("", "B", "iB")},
}


class Size(click.ParamType[int]):
    """Bytes, in powers of 1024: 500M, 8GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: ANN401
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]?(?:i?B)?)", value)
        if match is None or match[2] not in _UNITS or not float(match[1]):
            self.fail(f"{value!r} is not a size; give one such as 500M or 8GiB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2]])


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


def memory_budget_option(command: Command) -> Command:
    return click.option(
        "--memory-budget",
        type=Size(),
        help="Keep below this above the imports, such as 8GiB: hidden states go to disk if they have to.",
    )(command)


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
