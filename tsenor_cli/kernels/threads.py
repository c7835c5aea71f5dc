"""Chunks of work over torch's number of threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

CHUNK_SCORES = 1 << 20  # a thread's helping: some milliseconds
Scratch = TypeVar("Scratch")


def over_chunks(
    work: Callable[[int, int, Scratch], None], count: int, size: int, allocate: Callable[[], Scratch]
) -> None:
    """Call work(first, last, scratch) for count items in chunks of `size`; `work` releases the GIL.

    Each thread allocates its scratch once. The cuts do not depend on the number of threads. An exception is raised.
    """
    chunks = iter([(first, min(first + size, count)) for first in range(0, count, size)])

    def help_out() -> None:
        scratch = allocate()
        for first, last in chunks:  # shared: the next one goes to whoever asks first
            work(first, last, scratch)

    workers = min(torch.get_num_threads(), -(-count // size))
    if workers <= 1:
        help_out()
        return
    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(help_out) for _ in range(workers)]:
            future.result()
