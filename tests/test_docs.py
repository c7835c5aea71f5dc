"""What the documents show is run, and every option is explained."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
import torch

from tsenor_cli.cli import cli

ROOT = Path(__file__).parent.parent
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#]+)[^)]*\)")


def commands(group=cli, path=()):
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def test_the_examples_of_solving_masks_run(capsys):
    examples = PYTHON.findall((ROOT / "docs" / "solving-masks.md").read_text())
    assert len(examples) == 4
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "docs/solving-masks.md", "exec"), names)
    assert "stopped at the largest number of iterations" in capsys.readouterr().out


def test_the_example_of_the_readme_runs():
    (example,) = PYTHON.findall((ROOT / "README.md").read_text())
    exec(compile(example, "README.md", "exec"), {"weight": torch.randn(64, 64)})


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")], ids=str)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize(("path", "command"), list(commands()), ids=str)
def test_every_command_and_option_is_explained(path, command):
    readme = (ROOT / "README.md").read_text()
    assert f"tsenor {' '.join(path)}" in readme
    assert command.help
    if not isinstance(command, click.Group):
        assert "Example: tsenor " in command.help
    for option in command.params:
        assert isinstance(option, click.Argument) or option.help, option.name
