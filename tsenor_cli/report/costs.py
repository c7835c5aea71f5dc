"""What a run costs: seconds by stage, memory, bytes read and written."""

from __future__ import annotations

import sys
import time
from pathlib import Path

_PROC = Path("/proc/self")


class Costs:
    """Of a run that begins now."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._moved = _moved_bytes()
        self.stages: dict[str, float] = {}  # seconds

    def spent(self, stage: str, **elsewhere: float) -> None:
        """All since the last call went to `stage`, but for the seconds known to have gone elsewhere."""
        now = time.perf_counter()
        rest = max(now - self._last - sum(elsewhere.values()), 0.0)
        self._last = now
        for name, seconds in {stage: rest, **elsewhere}.items():
            self.stages[name] = self.stages.get(name, 0.0) + seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    @property
    def moved_bytes(self) -> tuple[int, int] | tuple[None, None]:
        """Read and written, by calls of the process; None where the system does not count them."""
        if self._moved is None:
            return None, None
        (read, written), (read_now, written_now) = self._moved, _moved_bytes() or self._moved
        return read_now - read, written_now - written


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far; 0 on Windows, where nothing in Python's library tells."""
    if (_PROC / "status").is_file():  # getrusage would count what the parent held before exec, too
        return _facts("status")["VmHWM"] * 1024
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def memory_bytes() -> int | None:
    """The resident size of this process now, where the system tells."""
    return _facts("status")["VmRSS"] * 1024 if (_PROC / "status").is_file() else None


def _moved_bytes() -> tuple[int, int] | None:
    try:
        facts = _facts("io")
    except OSError:  # no Linux, or not allowed
        return None
    return facts["rchar"], facts["wchar"]


def _facts(file: str) -> dict[str, int]:
    """The numbers of a file of lines such as `VmHWM:  1234 kB`."""
    pairs = (line.split(":", 1) for line in (_PROC / file).read_text(encoding="utf-8").splitlines())
    return {name: int(value.split()[0]) for name, value in pairs if value.split() and value.split()[0].isdigit()}
