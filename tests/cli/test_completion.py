"""Completion, asked as bash, zsh and fish ask; and the scripts themselves, where the shell is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

SHELLS = ("bash", "zsh", "fish")


def ask(shell, *words):
    """What a shell is told when the last of `words` is to be completed."""
    environment = {**os.environ, "_TSENOR_COMPLETE": f"{shell}_complete", "COMP_WORDS": " ".join(words)}
    environment["COMP_CWORD"] = words[-1] if shell == "fish" else str(len(words) - 1)
    arguments = [sys.executable, "-c", "from tsenor_cli.cli import cli; cli(prog_name='tsenor')"]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_commands_options_choices_and_places(shell):
    assert {"prune", "verify", "report", "inspect", "eval", "bench"} <= set(
        ask(shell, "tsenor", "").replace(",", " ").split()
    )
    assert "--fail-if" in ask(shell, "tsenor", "prune", "--fa")
    assert "sparsegpt" in ask(shell, "tsenor", "prune", "--method", "sp")
    assert "perplexity_ratio" in ask(shell, "tsenor", "report", "--fail-if", "perplexity_")
    assert "dir" in ask(shell, "tsenor", "prune", "mod")
    assert "file" in ask(shell, "tsenor", "prune", "--calibration", "te")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_one_that_the_shell_takes(shell, tmp_path):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    arguments = [sys.executable, "-c", "from tsenor_cli.cli import cli; cli(prog_name='tsenor')"]
    environment = {**os.environ, "_TSENOR_COMPLETE": f"{shell}_source"}
    script = tmp_path / "script"
    script.write_text(subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout)
    assert "tsenor" in script.read_text()
    subprocess.run([shell, "-n", str(script)], check=True)
