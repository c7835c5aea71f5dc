"""Chunks of work over torch's number of threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

CHUNK_SCORES = 1 << 20  # a thread's helping: some milliseconds


def over_chunks(work: Callable[[int, int], None], count: int, size: int) -> None:
    """Call work(first, last) for count items in chunks of `size`; `work` releases the GIL.

    The cuts do not depend on the number of threads. The first exception ends it.
    """
    chunks = [(first, min(first + size, count)) for first in range(0, count, size)]
    workers = min(torch.get_num_threads(), len(chunks))
    if workers <= 1:
        for first, last in chunks:
            work(first, last)
        return
    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(work, first, last) for first, last in chunks]:
            future.result()
