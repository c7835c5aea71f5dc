"""What a foreign config may cost: one that asks for a billion layers must fail, and not fill the machine first."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

_MEMORY_BYTES = 2**28  # a module on the meta device takes some KiB: enough for 50,000 of them


class TooLargeError(Exception):
    """More is built than the checkpoint can be of."""


@contextmanager
def bounded_modules(most: int) -> Iterator[None]:
    """Let at most so many parameters and modules come into being."""
    left = most

    def count(*_: Any) -> None:  # noqa: ANN401  (module, name, and what is registered)
        nonlocal left
        left -= 1
        if left < 0:
            raise TooLargeError("its config asks for more layers than the checkpoint can have")

    hooks = (
        nn.modules.module.register_module_parameter_registration_hook(count),
        nn.modules.module.register_module_module_registration_hook(count),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Let the process grow by _MEMORY_BYTES at most; MemoryError beyond. Linux only: others do not enforce it."""
    status = Path("/proc/self/statm")
    if sys.platform != "linux" or not status.is_file():
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(status.read_text(encoding="ascii").split()[0]) * resource.getpagesize() + _MEMORY_BYTES
    if before[0] != resource.RLIM_INFINITY:
        limit = min(limit, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
