#!/usr/bin/env python3
"""Write docs/commands.md from the command line and docs/report-schema.md from the schema of the report.

    scripts/generate_docs.py [--check]

With --check nothing is written; exit 1 if a page is not what it would be, and say which.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import signal
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from tsenor_cli import errors
from tsenor_cli.cli import cli
from tsenor_cli.cli.signals import Stopped

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = "tsenor_cli/report/schema.json"
NOTE = "<!-- Written by scripts/generate_docs.py from {}: change that instead. -->\n"
DEFAULT = re.compile(r"\s*\[default: (.*)\]$")  # how a help text says a default that depends on something
NO_LIMIT = 2**53  # from here on a limit only keeps readers of JSON from harm
Node = dict[str, Any]  # of a JSON Schema


def main() -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    check = parser.parse_args().check
    schema = Schema(json.loads((ROOT / SCHEMA).read_text(encoding="utf-8")))
    pages = {ROOT / "docs/commands.md": commands_page(cli), ROOT / "docs/report-schema.md": schema.page()}
    stale = [page for page, text in pages.items() if not page.exists() or page.read_text(encoding="utf-8") != text]
    for page in stale:
        if check:
            print(f"{page.relative_to(ROOT)} is stale: run scripts/generate_docs.py", file=sys.stderr)
        else:
            page.write_text(pages[page], encoding="utf-8")
            print(page.relative_to(ROOT))
    return int(check and bool(stale))


def commands_page(root: click.Command) -> str:
    """Every command with its options, then the exit codes."""
    settings: dict[str, Any] = {"info_name": "tsenor", **root.context_settings}
    parts = [
        NOTE.format("the commands themselves"),
        "# Commands\n",
        "What `--help` says, on one page. An option for which no default is given is off, or not set.\n",
    ]
    for context in contexts(click.Context(root, **settings)):
        parts += section(context)
    parts += [
        "## Exit codes\n",
        "An error is one line on stderr; [troubleshooting](troubleshooting.md) says what to do about each.\n",
        table(("code", "in Python", "meaning"), exit_codes()),
    ]
    return "\n".join(parts)


def contexts(context: click.Context) -> Iterator[click.Context]:
    """The command of this context and all below it, in the order in which they were added."""
    yield context
    if isinstance(context.command, click.Group):
        for name, below in context.command.commands.items():
            yield from contexts(click.Context(below, info_name=name, parent=context))


def section(context: click.Context) -> Iterator[str]:
    """Heading, usage, help and options of one command."""
    path, command = context.command_path, context.command
    if not command.help:
        raise ValueError(f"{path} has no help")
    yield f"## `{path}`\n"
    yield fenced(" ".join([path, *command.collect_usage_pieces(context)]))
    for paragraph in inspect.cleandoc(command.help).split("\n\n"):
        as_it_is = paragraph.removeprefix("\b\n")
        yield prose(paragraph) if as_it_is == paragraph else fenced(as_it_is.removeprefix("Example: "))
    if isinstance(command, click.Group):
        rows = []
        for name, below in command.commands.items():
            anchor = f"{path} {name}".replace(" ", "-")
            rows.append((f"[`{name}`](#{anchor})", escaped(below.get_short_help_str(200))))
        yield table(("command", "meaning"), rows)
    options = [option for option in command.get_params(context) if isinstance(option, click.Option)]
    yield table(("option", "meaning"), map(option_row, options))


def option_row(option: click.Option) -> tuple[str, str]:
    """How it is written; what it does, and what holds without it."""
    if not option.help:
        raise ValueError(f"{option.opts[0]} has no help")
    names, text, default = [*option.opts, *option.secondary_opts], option.help, ""
    if found := DEFAULT.search(text):
        text, default = text[: found.start()], escaped(found[1])
    elif not option.is_flag and isinstance(option.default, str | int | float | tuple):
        default = codes(option.default if isinstance(option.default, tuple) else [option.default])
    if not option.is_flag:
        names[-1] += f" {metavar(option)}"
    return codes(names), " ".join(
        [escaped(text), *choices(option.type), *([f"Default: {default}."] if default else [])]
    )


def metavar(option: click.Option) -> str:
    """What stands for the value."""
    name = option.type.name.removesuffix(" range")
    return option.metavar or {"directory": "path", "file": "path"}.get(name, name).upper()


def choices(kind: click.ParamType[Any]) -> Iterator[str]:
    """What values there are, if they are listed or in a range."""
    if isinstance(kind, click.Choice):
        yield f"One of {codes(kind.choices)}."
    elif isinstance(kind, click.IntRange | click.FloatRange):
        yield f"{limits(kind.min, kind.max, 'At least ')}."


def exit_codes() -> Iterator[tuple[str, str, str]]:
    """From the classes of errors, whose docstrings say what they mean, and from the signals."""
    yield "`0`", "", "Done."
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TsenorError)]
    for kind in sorted(kinds, key=lambda kind: kind.exit_code):
        meaning = re.sub(r" \(exit \d+\)", "", inspect.cleandoc(kind.__doc__ or "").partition("\n")[0])
        yield f"`{kind.exit_code}`", f"[`{kind.__name__}`](troubleshooting.md#{kind.code})", escaped(meaning)
    for number in (signal.SIGINT, signal.SIGTERM):
        stopped = Stopped(number)
        yield f"`{stopped.exit_code}`", "", f"{stopped.what.capitalize()} ({number.name})."


class Schema:
    """A JSON Schema of the kind that ours is, in Markdown."""

    def __init__(self, schema: Node) -> None:
        """Find all objects with fields of their own, and the paths to each of them."""
        self.root, self.definitions = schema, schema["$defs"]
        self.objects: dict[str, tuple[list[str], Node]] = {}
        self._collect("", schema)

    def page(self) -> str:
        """Every field, object by object, then the types that have a name."""
        version = self.root["properties"]["schema_version"]["const"]
        parts = [
            NOTE.format(SCHEMA),
            "# Report schema\n",
            prose(f"The fields of tsenor-report.json, schema version {version}. {self.root['description']}"),
            f"`a[]` is an element of the list `a`. The [JSON Schema](../{SCHEMA}) has every limit.\n",
        ]
        for paths, node in self.objects.values():
            if paths != [""]:
                parts.append(f"## {codes(paths)}\n")
                parts += [prose(node[key]) for key in ("description",) if key in node]
            parts.append(table(("field", "type", "meaning"), self._rows(node)))
        named = [name for name, node in self.definitions.items() if "properties" not in self._resolved(node)]
        rows = [(f"`{name}`", self._kind(self.definitions[name], whole=True)) for name in named]
        return "\n".join([*parts, "## Types\n", table(("name", "type"), rows)])

    def _collect(self, path: str, node: Node) -> None:
        node = self._resolved(node)
        if "items" in node:
            self._collect(f"{path}[]", node["items"])
        if "properties" in node:
            paths, _ = self.objects.setdefault(json.dumps([node["properties"], node["required"]]), ([], node))
            paths.append(path)
            for name, field in node["properties"].items():
                self._collect(f"{path}.{name}".removeprefix("."), field)

    def _resolved(self, node: Node) -> Node:
        """The node with what it refers to, or consists of, filled in; what may be null without the null."""
        if "$ref" in node:
            return self._resolved(self._definition(node)) | {key: node[key] for key in node if key != "$ref"}
        if "anyOf" in node:
            (one,) = (other for other in node["anyOf"] if other != {"type": "null"})
            return self._resolved(one) | {key: node[key] for key in node if key != "anyOf"}
        for part in map(self._resolved, node.get("allOf", ())):
            fields, needed = part["properties"] | node["properties"], part["required"] + node["required"]
            node = node | {"properties": fields, "required": needed}
        return node

    def _definition(self, node: Node) -> Node:
        found: Node = self.definitions[node["$ref"].removeprefix("#/$defs/")]
        return found

    def _rows(self, node: Node) -> Iterator[tuple[str, str, str]]:
        for name, field in node["properties"].items():
            optional = [] if name in node["required"] else ["May be absent."]
            yield f"`{name}`", self._kind(field), escaped(" ".join([*optional, field.get("description", "")]))

    def _kind(self, node: Node, *, whole: bool = False) -> str:
        """The type in words; just its name if it has one."""
        if "$ref" in node:
            name = node["$ref"].removeprefix("#/$defs/")
            return "object" if "properties" in self._resolved(node) else f"[{name}](#types)"
        if "anyOf" in node:
            return " or ".join(sorted(map(self._kind, node["anyOf"]), key="null".__eq__))
        if "const" in node:
            return f"`{json.dumps(node['const'])}`"
        if "enum" in node:
            return codes(value for value in node["enum"] if value is not None) + " or null" * (None in node["enum"])
        types = node["type"] if isinstance(node["type"], list) else [node["type"]]
        fitting = f" fitting `{node['pattern']}`" if whole and "pattern" in node else ""
        return " or ".join(self._plain(one, node) for one in types) + fitting

    def _plain(self, one: str, node: Node) -> str:
        if one == "array":
            return f"list of {self._kind(node['items'])}"
        if one == "object" and isinstance(node.get("additionalProperties"), dict):
            return f"object of {self._kind(node['additionalProperties'])}"
        if one in {"integer", "number"}:
            least, sign = node.get("minimum"), "≥ "
            if "exclusiveMinimum" in node:
                least, sign = node["exclusiveMinimum"], "> "
            return f"{one} {limits(least, node.get('maximum'), sign)}".strip()
        return one


def limits(least: float | None, most: float | None, above: str) -> str:
    """A range in words."""
    if most is not None and most < NO_LIMIT:
        return f"{least:g} to {most:.4g}" if least is not None else f"at most {most:.4g}"
    return "" if least is None else f"{above}{least:g}"


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = (f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows))
    return "\n".join(lines) + "\n"


def fenced(text: str) -> str:
    return f"```\n{text}\n```\n"


def codes(values: Iterable[object]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def prose(text: str) -> str:
    words = escaped(" ".join(text.split()))
    return textwrap.fill(words, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def escaped(text: str) -> str:
    """Text that means nothing to Markdown, but for options, which become code."""
    text = re.sub(r"([\\*_<|`])", r"\\\1", text)
    return re.sub(r"(?<![\w-])(--[a-z][a-z-]*)", r"`\1`", text)


if __name__ == "__main__":
    sys.exit(main())
