"""Ctrl-C and SIGTERM: raised where the program stands, and enforced where it does not listen.

Python runs signal handlers between two of its own instructions; a long computation in C, such as the factorisation of
a large matrix, may keep it from that for minutes. A thread sees to it that the process ends all the same: nothing is
lost by that, because a run can be killed at any time (checkpoint/staging.py).
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_GRACE_S = 1.5  # to end in order; people give up after two
_CODES = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
_DONE = b"\0"  # no signal has this number


class Stopped(BaseException):
    """A signal, raised where the program stands so that everything is cleaned up on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code, self.what = _CODES[signal.Signals(number)]


@contextmanager
def signals_raise(say: Callable[[Stopped], object]) -> Iterator[None]:
    """Raise Stopped for the first signal; end the process at once at the second, or when the first has no effect.

    Args:
        say: called with what happened before the process is ended.
    """
    raised: list[Stopped] = []

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        for caught in _CODES:  # the next one is for the watcher alone
            signal.signal(caught, lambda *_: None)
        raised.append(Stopped(number))
        raise raised[0]

    before = {number: signal.signal(number, stop) for number in _CODES}
    try:
        with _watcher(say):
            yield
    except Exception as error:
        for stopped in raised:  # and a library has made an error of its own of it, as pybind11 does in an import
            for note in getattr(error, "__notes__", ()):
                stopped.add_note(note)
            raise stopped from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _watcher(say: Callable[[Stopped], object]) -> Iterator[None]:
    if sys.platform == "win32":  # nothing can be waited for there but sockets
        yield
        return
    watched, woken = os.pipe()
    os.set_blocking(woken, False)
    woken_before = signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(watched, say), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken_before)
        os.write(woken, _DONE)
        watcher.join()
        os.close(woken)
        os.close(watched)


def _watch(pipe: int, say: Callable[[Stopped], object]) -> None:
    first = _next(pipe)
    if first is None or (select.select([pipe], [], [], _GRACE_S)[0] and _next(pipe) is None):
        return
    stopped = Stopped(first)
    say(stopped)
    os._exit(stopped.exit_code)


def _next(pipe: int) -> int | None:
    """The next signal of ours; None at the end."""
    while (byte := os.read(pipe, 1)) != _DONE:
        if byte[0] in _CODES:  # others may have handlers, too
            return byte[0]
    return None
