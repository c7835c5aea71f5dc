"""Fixtures that every room shares: small checkpoints made once, and the command line called in-process."""

from __future__ import annotations

import os

if os.environ.get("TSENOR_TEST_DEVICE") != "cuda":  # Triton reads this once, and torch or transformers may import it
    os.environ["TRITON_INTERPRET"] = "1"

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkpoints import add_tokenizer, make_checkpoint

from tsenor_cli.cli import run


def pytest_collection_modifyitems(config, items):
    """Leave out the tests that need a card, unless they are asked for: scripts/gpu-check does, and none may skip."""
    if os.environ.get("TSENOR_TEST_DEVICE") == "cuda":
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@dataclass(frozen=True)
class Outcome:
    """What one command gave."""

    code: int
    out: str
    err: str


@pytest.fixture
def tsenor(capsys):
    """The command line, called in this process; for example with "prune", path, "--nm", "2:4"."""

    def call(*arguments) -> Outcome:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A file of made-up words."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    letters = random.Random(0)
    path.write_text(" ".join("".join(letters.choices("abcdefgh ijklmnop,.", k=7)) for _ in range(400)))
    return path


@pytest.fixture(scope="session")
def pristine_llama(tmp_path_factory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("pristine") / "llama")


@pytest.fixture
def llama(pristine_llama, tmp_path) -> Path:
    """A sharded tiny Llama that the test may damage."""
    return shutil.copytree(pristine_llama, tmp_path / "llama")


@pytest.fixture(scope="session")
def speaking_llama(tmp_path_factory) -> Path:
    """A tiny Llama with a tokenizer; not to be damaged."""
    return add_tokenizer(make_checkpoint("llama", tmp_path_factory.mktemp("speaking") / "llama"))


@pytest.fixture
def real_page():
    """For tests in which the page of a run is looked at."""


@pytest.fixture(autouse=True)
def _plain_page(request, monkeypatch):
    """To draw a page takes longer than to prune a tiny model: only where it matters is it drawn."""
    if "real_page" not in request.fixturenames:
        monkeypatch.setattr("tsenor_cli.report.page.report_page", lambda *_: "<!doctype html></html>")


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path, monkeypatch):
    """Default outputs go to the current directory: never let that be the source tree."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
