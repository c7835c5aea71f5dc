"""Chunks of work over torch's number of threads."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch

CHUNK_SCORES = 1 << 18  # a thread's helping: less than a millisecond, so that small matrices have some for all
KEPT = 3  # kinds of work that follow one another again and again
Scratch = TypeVar("Scratch")
T = TypeVar("T")
P = ParamSpec("P")
_own: Any = threading.local()
_limits: Any = threading.local()


def over_chunks(
    work: Callable[[int, int, Scratch], None],
    count: int,
    size: int,
    scratch: tuple[Hashable, Callable[[], Scratch]],
) -> None:
    """Call work(first, last, scratch) for count items in chunks of `size`; `work` releases the GIL.

    `scratch` is a key or None, and how to allocate what a thread writes to; a thread keeps the last few, for the next
    call with that key. The cuts do not depend on the number of threads, nor does what is computed on whether one of
    them takes denormal numbers for 0. An exception is raised.
    """
    chunks = iter([(first, min(first + size, count)) for first in range(0, count, size)])

    def help_out() -> None:
        own, flushes = _scratch(*scratch), _flushes_denormals()
        try:
            torch.set_flush_denormal(False)  # of this thread
            for first, last in chunks:  # shared: the next one goes to whoever asks first
                work(first, last, own)
        finally:
            torch.set_flush_denormal(flushes)
            list(chunks)  # after an error nobody starts another

    workers = min(getattr(_limits, "threads", torch.get_num_threads()), -(-count // size))
    helpers = [_pool(torch.get_num_threads()).submit(help_out) for _ in range(workers - 1)]
    try:
        help_out()  # it takes a tenth of a millisecond until a thread is awake
    finally:
        # Waits for those at work. Who has not begun, busy with the work of others, is not needed any more.
        errors = [helper.exception() for helper in helpers if not helper.cancel()]
    for error in filter(None, errors):
        raise error


def limited(work: Callable[P, T], threads: int) -> Callable[P, T]:
    """The same work, for which the thread that does it may have so many threads: others have the rest."""

    def with_its_share(*args: P.args, **kwargs: P.kwargs) -> T:
        _limits.threads = threads
        try:
            return work(*args, **kwargs)
        finally:
            del _limits.threads

    return with_its_share


def _flushes_denormals() -> bool:
    """Whether this thread takes denormal numbers for 0, perhaps by inheritance; small float16 scores become some."""
    return sys.float_info.min / 2 == 0.0


def _scratch(key: Hashable, allocate: Callable[[], Scratch]) -> Scratch:
    if key is None:  # nothing to keep, and nothing to forget for it
        return allocate()
    kept = _own.__dict__
    if key not in kept:
        for old in list(kept)[: len(kept) - KEPT + 1]:
            del kept[old]
        kept[key] = allocate()
    scratch: Scratch = kept[key]
    return scratch


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Threads that stay: to start them takes as long as a small matrix."""
    return ThreadPoolExecutor(workers, thread_name_prefix="tsenor")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of the threads
