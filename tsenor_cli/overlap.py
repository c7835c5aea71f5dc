"""Work that is done ahead of whoever uses its results, so that reading, computing and writing go on at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def ahead(work: Callable[..., T], arguments: Iterable[tuple[Any, ...]], count: int, *, threads: int = 1) -> Iterator[T]:
    """The results of `work` in order, with up to `count` of them begun while one is used.

    `arguments` are taken in the caller's thread, one each time a result is asked for: what computes them runs beside
    the work. With one thread the work is done in order, too.
    """
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[T]] = deque()
        try:
            for given in arguments:
                pending.append(pool.submit(work, *given))
                if len(pending) > count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for left in pending:
                left.cancel()
