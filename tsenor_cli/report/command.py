"""The command that repeats a run, from its report alone."""

from __future__ import annotations

import re
import shlex
from typing import Any

import yaml

from tsenor_cli.report.records import Report
from tsenor_cli.specs import CalibrationSpec, FinetuneSpec, PruneSpec

RECIPE_FILE = "recipe.yaml"
_FLAGS = ("strict", "fallback", "allow_nonfinite", "save_masks")
_VALUES = (
    "solver",
    "tau",
    "iterations",
    "local_search",
    "damping",
    "few_tokens",
    "min_coverage",
    "memory_budget",
    "device",
)


def repeat_command(report: Report) -> list[str]:
    """The arguments of `tsenor`, without an output; with a recipe, they name RECIPE_FILE (see `recipe`)."""
    options, source = report.options, str(report.model["source"])
    if report.model["revision"] is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        source += f"@{report.model['revision']}"
    arguments = ["prune", source]
    if options["rules"]:
        arguments += ["--recipe", RECIPE_FILE]
    elif report.pattern is not None:
        arguments += ["--nm", "{n}:{m}".format(**report.pattern)]
        arguments += [] if report.pattern["transposable"] else ["--standard"]
        arguments += ["--method", options["method"]]
    arguments += _text("--calibration", options["calibration"])
    if options["eval"] is not None:  # what the two have in common is said once
        said = {"source": options["eval"]["source"]} if options["calibration"] is not None else options["eval"]
        arguments += _text("--eval", said)
    for name in _VALUES:
        if options[name] is not None and options[name] != _default(PruneSpec, name):
            arguments += [_option(name), str(options[name])]
    for name in ("only", "ignore"):
        for pattern in options[name]:
            arguments += [_option(name), pattern]
    arguments += [_option(name) for name in _FLAGS if options[name]]
    return arguments + ([] if options["update"] else ["--no-update"])


def finetune_command(report: Report) -> list[str]:
    """The arguments of `tsenor` that repeat the fine-tuning of what is pruned, without an output; none without one."""
    training = report.training
    if training is None or report.perplexity is None:
        return []
    arguments = ["finetune", training["source"], "--text", training["text"]["source"]]
    for name, value in training["options"].items():
        if value != _default(FinetuneSpec, name):
            arguments += [_option(name)] if value is True else [_option(name), str(value)]
    return arguments + ([] if training["held_out"] else ["--eval", report.perplexity["after"]["source"]])


def shell_command(report: Report) -> str:
    """The same as lines to paste."""
    commands = [repeat_command(report), finetune_command(report)]
    return "\n".join(shlex.join(["tsenor", *arguments]) for arguments in commands if arguments)


def recipe(report: Report) -> str | None:
    """The recipe of the run as YAML, if there was one."""
    if not report.options["rules"]:
        return None
    found: dict[str, Any] = {}
    if report.pattern is not None:
        kind = "transposable" if report.pattern["transposable"] else "standard"
        found = {"nm": "{n}:{m}".format(**report.pattern), "kind": kind, "method": report.options["method"]}
    return str(yaml.safe_dump({**found, "rules": report.options["rules"]}, sort_keys=False, allow_unicode=True))


def _text(asked: str, facts: dict[str, Any] | None) -> list[str]:
    if facts is None:
        return []
    arguments = [asked, facts["source"]]
    names = {"field": "--text-field", "samples": "--samples", "sequence_length": "--sequence-length", "seed": "--seed"}
    for name, option in names.items():
        if facts.get(name) is not None and facts[name] != _default(CalibrationSpec, name):
            arguments += [option, str(facts[name])]
    return arguments


def _default(kind: type, name: str) -> object:
    return kind.__dataclass_fields__[name].default  # type: ignore[attr-defined]


def _option(name: str) -> str:
    return "--text-field" if name == "field" else "--" + name.replace("_", "-")
