"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Command = Callable[..., Any]


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
