"""The shape of the house: who may import whom, and what --help may load. A diagram nobody checks is fiction."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tsenor_cli"
LEAVES = {"specs", "errors", "observer", "device", "versions"}  # everyone may import these
MAY_IMPORT = {
    "__init__": {"pipeline", "masks"},
    "__main__": {"cli"},
    "cli": {"pipeline", "distributed", "forecast", "recipe", "checkpoint", "calibration", "report", "bench"},
    "recipe": set(),
    "calibration": {"checkpoint", "distributed", "kernels", "pruners"},
    "bench": {"masks", "training"},
    "distributed": {"checkpoint", "report"},  # for the types of a plan and of a record only
    "distribution": {"checkpoint"},
    "forecast": {"checkpoint", "distribution"},
    "rates": {"calibration", "checkpoint", "forecast", "kernels", "pruners", "report"},
    "overlap": set(),
    "pipeline": {
        "checkpoint",
        "calibration",
        "distributed",
        "distribution",
        "forecast",
        "job",
        "streaming",
        "layerwise",
        "rates",
        "report",
        "training",
    },
    "job": {"checkpoint", "calibration", "distribution", "identity", "pruners", "report", "streaming"},
    "identity": {"__init__", "checkpoint", "calibration", "report"},
    "streaming": {"checkpoint", "kernels", "overlap", "pruners", "report"},
    "training": {"calibration", "checkpoint", "identity", "job", "report"},
    "layerwise": {"streaming", "checkpoint", "calibration", "distributed", "pruners", "report"},
    "checkpoint": {"overlap"},
    "pruners": {"masks", "kernels"},
    "masks": {"kernels"},
    "kernels": set(),
    "report": {"checkpoint", "pruners", "masks"},
    "specs": {"errors"},
    "errors": set(),
    "device": {"errors"},
    "observer": {"checkpoint", "report"},  # for the types of a plan and of a record only
    "versions": set(),
}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The top-level modules that a source imports anywhere, late imports included."""
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows(path):
    wanted = {name.split(".")[1] for name in imports(path) if name.startswith("tsenor_cli.")}
    assert wanted - {room(path)} - LEAVES <= MAY_IMPORT[room(path)] | (LEAVES & MAY_IMPORT[room(path)])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_command_line_knows_click_and_terminals(path):
    terminal = {"click", "rich", "tqdm"} & {name.split(".")[0] for name in imports(path)}
    assert not terminal or room(path) == "cli"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_adapter_and_training_touch_transformers(path):
    uses = any(name.split(".")[0] == "transformers" for name in imports(path))
    assert not uses or path.parent.name in {"adapter", "training"}


def test_no_file_is_a_drawer():
    assert not [path for path in SOURCES if path.stem in {"utils", "helpers", "common", "misc"}]


@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments):
    code = (
        "import sys; from tsenor_cli.cli import run; code = run(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'numba', 'numpy', 'rich'} & set(sys.modules);"
        "assert not heavy, heavy; exit(code)"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


@pytest.mark.parametrize(
    "command",
    [[], ["prune"], ["verify"], ["inspect"], ["eval"], ["bench"], ["bench", "masks"], ["bench", "training"]],
)
def test_help_shows_its_example_on_a_line_of_its_own(command):
    arguments = [sys.executable, "-m", "tsenor_cli", *command, "--help"]
    text = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    assert "\\b" not in text
    assert command == ["bench"] or "\n  Example: tsenor " in text


def test_verify_needs_no_transformers():
    """It checks files; loading transformers would cost more than the check."""
    code = "import sys, tsenor_cli.pipeline; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_is_quick():
    """The promise is 0.3 s on a quiet machine; ten times that still fails if torch is loaded on a slow one."""
    best = min(_seconds_for_help() for _ in range(3))
    assert best < 1.0


def _seconds_for_help() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tsenor_cli", "--help"], check=True, capture_output=True)
    return time.perf_counter() - started
