"""The command line: one file per command, and the one place where errors become a line and an exit code.

Exit codes: 0 ok · 1 failed · 2 usage · 3 input refused · 4 a check fell short · 5 output exists or is locked ·
130 interrupted · 143 terminated.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from tsenor_cli import __version__
from tsenor_cli.cli.bench import bench
from tsenor_cli.cli.console import printable
from tsenor_cli.cli.eval import evaluate
from tsenor_cli.cli.inspect import inspect
from tsenor_cli.cli.prune import prune
from tsenor_cli.cli.signals import Stopped, signals_raise
from tsenor_cli.cli.verify import verify
from tsenor_cli.errors import TsenorError

_ERROR_LINE = "tsenor: error: {}"
_RESUME = "; the same command with --resume goes on where this one stopped"


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
        with signals_raise(_ERROR_LINE.format("{}" + _RESUME * (arguments[:1] == ["prune"]))):
            cli.main(list(arguments), prog_name="tsenor", standalone_mode=False)
            sys.stdout.flush()
            return 0
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "tsenor"
        return _fail(f"{error.format_message()} (see {command} --help)", error.exit_code)
    except TsenorError as error:
        return _fail(_with_notes(str(error), error), error.exit_code)
    except Stopped as stopped:
        return _fail(_with_notes(stopped.what, stopped), stopped.exit_code)
    except BrokenPipeError:
        # The reader of stdout has gone: nothing more can be said there. Keep the interpreter's last flush quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 1)


def _fail(message: str, code: int) -> int:
    click.echo(_ERROR_LINE.format(printable(message)), err=True)
    return code


def _with_notes(message: str, error: BaseException) -> str:
    """What is left after a run that failed is in the notes of its error (checkpoint/staging.py)."""
    return "; ".join([message, *getattr(error, "__notes__", ())])
