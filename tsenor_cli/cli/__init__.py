"""The command line: one file per command, and the one place where errors become a line and an exit code.

Exit codes: 0 ok · 1 failed · 2 usage · 3 input refused · 4 a check fell short · 5 output exists or is locked ·
130 interrupted · 143 terminated.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

import click

from tsenor_cli import __version__
from tsenor_cli.cli.bench import bench
from tsenor_cli.cli.eval import evaluate
from tsenor_cli.cli.inspect import inspect
from tsenor_cli.cli.prune import prune
from tsenor_cli.cli.verify import verify
from tsenor_cli.errors import TsenorError

_EXIT_CODES = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}


class _StoppedError(BaseException):
    """A signal, raised where the program stands so that everything is cleaned up on the way out."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="tsenor")
def cli() -> None:
    """Make Hugging Face checkpoints N:M sparse, with provably optimal masks.

    \b
    Example: tsenor prune meta-llama/Llama-3.1-8B --nm 2:4
    """


cli.add_command(prune)
cli.add_command(verify)
cli.add_command(inspect)
cli.add_command(evaluate)
cli.add_command(bench)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; every expected failure is one line on stderr."""
    try:
        with _signals_raise():
            cli.main(list(arguments), prog_name="tsenor", standalone_mode=False)
            sys.stdout.flush()
            return 0
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "tsenor"
        return _fail(f"{error.format_message()} (see {command} --help)", error.exit_code)
    except TsenorError as error:
        return _fail(str(error), error.exit_code)
    except _StoppedError as stopped:
        code, what = _EXIT_CODES[stopped.args[0]]
        return _fail(f"{what}; no output was written", code)
    except BrokenPipeError:
        # The reader of stdout has gone: nothing more can be said there. Keep the interpreter's last flush quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 1)


def _fail(message: str, code: int) -> int:
    # Names from a checkpoint may hold anything; a terminal must not obey them.
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in message)
    click.echo(f"tsenor: error: {line}", err=True)
    return code


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Ctrl-C and SIGTERM as exceptions of our own (click answers KeyboardInterrupt with exit 1)."""

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        raise _StoppedError(number)

    before = {number: signal.signal(number, stop) for number in _EXIT_CODES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
