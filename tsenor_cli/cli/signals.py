"""Ctrl-C and SIGTERM: raised where the program stands, and enforced where it does not listen.

Python runs signal handlers between two of its own instructions; a long computation in C, such as the factorisation of
a large matrix, may keep it from that for minutes. A thread sees to it that the process ends all the same: nothing is
lost by that, because a run can be killed at any time (checkpoint/staging.py).
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import NoReturn

import click

_GRACE_S = 1.5  # to end in order; people give up after two
_CODES = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
_DONE = b"\0"  # no signal has this number


class Stopped(BaseException):
    """A signal, raised where the program stands so that everything is cleaned up on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code, self.what = _CODES[signal.Signals(number)]


@contextmanager
def signals_raise(error_line: str) -> Iterator[None]:
    """Raise Stopped for the first signal; end the process at once at the second, or when the first has no effect.

    Args:
        error_line: how that is said, with {} for what happened.
    """
    before = {number: signal.signal(number, _raise) for number in _CODES}
    try:
        # On Windows nothing can be waited for but sockets.
        with _watcher(error_line) if os.name == "posix" else nullcontext():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _watcher(error_line: str) -> Iterator[None]:
    watched, woken = os.pipe()
    os.set_blocking(woken, False)
    woken_before = signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(watched, error_line), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken_before)
        os.write(woken, _DONE)
        watcher.join()
        os.close(woken)
        os.close(watched)


def _raise(number: int, _frame: FrameType | None) -> NoReturn:
    for caught in _CODES:  # the next one is for the watcher alone
        signal.signal(caught, lambda *_: None)
    raise Stopped(number)


def _watch(pipe: int, error_line: str) -> None:
    first = _next(pipe)
    if first is None or (select.select([pipe], [], [], _GRACE_S)[0] and _next(pipe) is None):
        return
    stopped = Stopped(first)
    click.echo(error_line.format(f"{stopped.what}, without waiting for what was being computed"), err=True)
    os._exit(stopped.exit_code)


def _next(pipe: int) -> int | None:
    """The next signal of ours; None at the end."""
    while (byte := os.read(pipe, 1)) != _DONE:
        if byte[0] in _CODES:  # others may have handlers, too
            return byte[0]
    return None
