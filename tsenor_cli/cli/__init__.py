"""The command line: one file per command, and the one place where errors become a line and an exit code.

Exit codes: 0 ok · 1 failed · 2 usage · 3 input refused · 4 a check fell short · 5 output exists or is locked ·
130 interrupted · 143 terminated.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from itertools import pairwise

import click

from tsenor_cli import __version__
from tsenor_cli.cli import console
from tsenor_cli.cli.bench import bench
from tsenor_cli.cli.eval import evaluate
from tsenor_cli.cli.finetune import finetune
from tsenor_cli.cli.inspect import inspect
from tsenor_cli.cli.merge import merge
from tsenor_cli.cli.prune import prune
from tsenor_cli.cli.report import report
from tsenor_cli.cli.signals import Stopped, signals_raise
from tsenor_cli.cli.verify import verify
from tsenor_cli.errors import DISK_FULL, SaidElsewhereError, TsenorError, UsageError, is_out_of_memory
from tsenor_cli.versions import versions

_RESUME = "the same command with --resume goes on where this one stopped"


def _show_version(context: click.Context, _option: click.Parameter, asked: bool) -> None:
    if asked:
        others = ", ".join(f"{name} {version}" for name, version in versions().items())
        console.emit(f"tsenor {__version__}\n{others}, {platform.system()} {platform.machine()}")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version, and those of everything that takes part in a result.",
)
def cli() -> None:
    """Make Hugging Face checkpoints N:M sparse, with provably optimal masks.

    \b
    Example: tsenor prune meta-llama/Llama-3.1-8B --nm 2:4
    """


for _command in (prune, merge, verify, finetune, report, inspect, evaluate, bench):
    cli.add_command(_command)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; every expected failure is one line on stderr."""
    console.set_log_format(as_json=_wants_json(arguments))
    hint = [_RESUME] if arguments[:1] in (["prune"], ["finetune"]) else []

    def end_at_once(stopped: Stopped) -> None:
        what = f"{stopped.what}, without waiting for what was being computed"
        console.error(what, stopped.exit_code, stopped.what, notes=hint)

    try:
        with signals_raise(end_at_once):
            cli.main(list(arguments), prog_name="tsenor", standalone_mode=False)
            if sys.stdout is not None:  # it is None if this process was started without one
                sys.stdout.flush()
            return 0
    except click.ClickException as error:
        return _misused(error)
    except SaidElsewhereError as error:
        return error.exit_code
    except TsenorError as error:
        return _fail(error, error.message, error.exit_code, error.code, error.remedy)
    except Stopped as stopped:
        if _is_one_of_many():  # torchrun stops all of them, and the first one speaks
            return stopped.exit_code
        return _fail(stopped, stopped.what, stopped.exit_code, stopped.what)
    except BrokenPipeError:
        # The reader of stdout has gone: nothing more can be said there. Keep the interpreter's last flush quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (OSError, MemoryError, RuntimeError) as error:
        return _fail_of_the_machine(error)


def _misused(error: click.ClickException) -> int:
    """What click has to say; to a command that needs another one after it, and was given none, its help."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return error.exit_code
    command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "tsenor"
    return _fail(error, f"{error.format_message()} (see {command} --help)", error.exit_code, UsageError.code)


def _fail_of_the_machine(error: OSError | MemoryError | RuntimeError) -> int:
    """What no command has put into words, because it may happen anywhere; anything else is a bug."""
    if isinstance(error, OSError):
        code = "disk-full" if error.errno in DISK_FULL else TsenorError.code
        return _fail(error, f"{error.filename or 'input or output'}: {error.strerror or error}", 1, code)
    if is_out_of_memory(error):
        return _fail(error, "out of memory", 1, "out-of-memory", "free some, or give it less to do at once")
    raise error


def _is_one_of_many() -> bool:
    """Whether torchrun has started this process, and another one before it."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0"


def _wants_json(arguments: Sequence[str]) -> bool:
    """Whether --log-format json is given; asked before the rest is understood, so that its errors are events, too."""
    return "--log-format=json" in arguments or ("--log-format", "json") in pairwise(arguments)


def _fail(error: BaseException, message: str, exit_code: int, code: str, remedy: str = "") -> int:
    """Say it, with what is left after a run that failed: the notes of its error (checkpoint/staging.py)."""
    console.error(message, exit_code, code, remedy, getattr(error, "__notes__", ()))
    return exit_code
