"""What Windows and macOS lack is not used, or guarded, and text files say how they are encoded.

No test here runs on those systems. The judge of what exists there is typeshed, which mypy reads; a run in which our
modules see no more than that shows where the guards lead.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import add_tokenizer

PACKAGE = Path(__file__).parent.parent / "tsenor_cli"

IMITATION = """
import builtins, signal, sys, torch, transformers, filelock, numba, os, click, rich, yaml, safetensors.torch

class Without:
    def __init__(self, real, *hidden, **own):
        vars(self).update(own, real=real, hidden=hidden)
    def __getattr__(self, name):
        if name in self.hidden:
            raise AttributeError(f"not on {platform}: {name}")
        return getattr(self.real, name)

platform, *arguments = sys.argv[1:]
linux_only = ("preadv", "pwritev", "sched_getaffinity", "posix_fadvise")
modules = {"os": Without(os, *linux_only), "sys": Without(sys, platform=platform)}
gone = set()
if platform == "win32":
    posix_only = ("pread", "pwrite", "fork", "register_at_fork", "geteuid", "getuid", "set_blocking", "sysconf")
    modules["os"] = Without(os, *linux_only, *posix_only, "O_DIRECTORY", name="nt")
    modules["signal"] = Without(signal, "SIGALRM", "SIGHUP", "SIGUSR1", "alarm", "setitimer", "pthread_sigmask")
    gone = {"fcntl", "grp", "pwd", "resource", "termios"}
real_import = builtins.__import__

def imitated(name, globals=None, *more, **named):
    ours = str((globals or {}).get("__name__")).startswith("tsenor_cli")
    if ours and name in gone:
        raise ModuleNotFoundError(f"not on {platform}: {name}")
    return modules[name] if ours and name in modules else real_import(name, globals, *more, **named)

builtins.__import__ = imitated
import tsenor_cli.pipeline, tsenor_cli.bench.machine
from tsenor_cli.checkpoint import staging
from tsenor_cli.cli import run
assert staging.os.name == ("nt" if platform == "win32" else "posix")
staging.ctypes.CDLL = lambda *_, **__: object()  # no renameat2
tsenor_cli.bench.machine.machine()
model, text, output = arguments
prune = ["prune", model, "--nm", "2:4", "-o", output, "--quiet"]
again = ["--overwrite", "--method", "sparsegpt", "--calibration", text, "--samples", "4", "--sequence-length", "16"]
for command in (["--help"], prune, [*prune, *again], ["verify", output, "--against", model]):
    assert run(command) == 0, command
"""


def missing(platform: str) -> list[str]:
    """What mypy misses there and not on Linux, in its own words."""
    options = ["--config-file=", "--ignore-missing-imports", "--follow-imports=skip", "--cache-dir=/dev/null"]

    def errors(name):
        command = [sys.executable, "-m", "mypy", *options, "--platform", name, str(PACKAGE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "checked" in done.stdout or done.returncode == 0, done.stdout + done.stderr
        return {line for line in done.stdout.splitlines() if ": error:" in line}

    return sorted(errors(platform) - errors("linux"))


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_nothing_is_used_that_the_other_systems_lack(platform):
    assert missing(platform) == []


def test_text_files_say_how_they_are_encoded():
    """Windows would choose another encoding than UTF-8."""
    options = ["--isolated", "--preview", "--select", "PLW1514", "--no-cache"]
    done = subprocess.run([sys.executable, "-m", "ruff", "check", *options, PACKAGE], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode()


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_guards_lead_somewhere(platform, llama, tmp_path):
    """Our modules see an os, a sys and a signal as they are there; what they import from elsewhere does not."""
    text = tmp_path / "text.txt"
    text.write_text("Neither here nor there. " * 20)
    command = [sys.executable, "-c", IMITATION, platform, add_tokenizer(llama), text, tmp_path / "pruned"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
