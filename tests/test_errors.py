"""Every code of an error is a heading of docs/troubleshooting.md, under its one exit code."""

from __future__ import annotations

import ast
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tsenor_cli.cli.signals import Stopped
from tsenor_cli.errors import CheckFailed, InputRefused, OutputUnavailable, TsenorError, UsageError

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
HEADING = re.compile(r"^### (.*)$", re.MULTILINE)
SECTION = re.compile(r"^### (.*)\n\n\*Exit (\d+)\.\*", re.MULTILINE)
NODES = [node for path in (ROOT / "tsenor_cli").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
CLASSES = {node.name: node for node in NODES if isinstance(node, ast.ClassDef)}
CALLS = [node for node in NODES if isinstance(node, ast.Call)]


def own(name: str, attribute: str) -> object:
    """What the body of a class sets an attribute to."""
    for line in CLASSES[name].body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == attribute:
            return ast.literal_eval(line.value)
    return None


def exit_code(name: str) -> object:
    """Of a class of expected failures; None for everything else."""
    if name not in CLASSES:
        return None
    inherited = (exit_code(ast.unparse(base)) for base in CLASSES[name].bases)
    return own(name, "exit_code") or next(filter(None, inherited), None)


def used() -> Iterator[tuple[str, object]]:
    """Every code with its exit code, if that is known: of classes, as calls give them, and of signals."""
    yield from ((own(name, "code"), exit_code(name)) for name in CLASSES if exit_code(name) and own(name, "code"))
    for call in CALLS:
        given = (part for keyword in call.keywords if keyword.arg == "code" for part in ast.walk(keyword.value))
        literals = (part.value for part in given if isinstance(part, ast.Constant) and isinstance(part.value, str))
        yield from ((code, exit_code(ast.unparse(call.func))) for code in literals)
    yield from ((stopped.what, stopped.exit_code) for stopped in map(Stopped, (signal.SIGINT, signal.SIGTERM)))


def test_the_page_has_every_code_and_no_other():
    headings, codes = HEADING.findall(PAGE), {code for code, _ in used()}
    assert len(headings) == len(set(headings))
    assert codes - set(headings) == set()
    assert set(headings) - codes == set()


def test_every_section_says_the_one_exit_code_of_its_code():
    said = {code: int(number) for code, number in SECTION.findall(PAGE)}
    assert list(said) == HEADING.findall(PAGE)
    assert [pair for pair in used() if pair[1] not in {None, said.get(pair[0])}] == []


def test_sections_stand_in_order_under_their_exit_code():
    for group in re.split(r"^## Exit ", PAGE, flags=re.MULTILINE)[1:]:
        sections = SECTION.findall(group)
        assert sections == sorted(sections)
        assert {number for _, number in sections} == set(re.findall(r"\d+", group.partition(":")[0]))


@pytest.mark.parametrize("code", sorted({code for code, _ in used()}))
def test_codes_are_kebab_case(code):
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", code)


@pytest.mark.parametrize("kind", [TsenorError, UsageError, InputRefused, CheckFailed, OutputUnavailable])
def test_an_error_has_the_code_of_its_class_or_its_own(kind):
    assert kind("a", code="no-luck").code == "no-luck"
    assert kind("a", "b").code == kind.code != "no-luck"


def test_whoever_raises_an_error_again_hands_its_code_on():
    again = [call for call in CALLS if ast.unparse(call.func) == "type(error)"]
    assert again
    assert all("code" in {keyword.arg for keyword in call.keywords} for call in again)
