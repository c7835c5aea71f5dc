"""What a run costs: seconds by stage, memory, bytes read and written."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

_PROC = Path("/proc/self")


class _OfProcess(NamedTuple):
    peak_memory_bytes: int
    read_bytes: int | None
    written_bytes: int | None


class Costs:
    """Of a run that begins now."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._moved = _moved_bytes()
        self.stages: dict[str, float] = {}  # seconds of this process
        self._processes: list[_OfProcess] = []

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

    def to_dict(self) -> dict[str, Any]:
        """As the report's summary has them."""
        read, written = self.moved_bytes
        return {
            "seconds": round(self.seconds, 3),
            "stages": {stage: round(seconds, 3) for stage, seconds in self.stages.items()},
            "peak_memory_bytes": self.peak_memory_bytes,
            "read_bytes": read,
            "written_bytes": written,
        }

    @property
    def processes(self) -> int:
        return max(len(self._processes), 1)

    @property
    def of_process(self) -> _OfProcess:
        """What this process has cost so far."""
        if self._moved is None:
            return _OfProcess(peak_memory_bytes(), None, None)
        (read, written), (read_now, written_now) = self._moved, _moved_bytes() or self._moved
        return _OfProcess(peak_memory_bytes(), read_now - read, written_now - written)

    def join(self, processes: list[_OfProcess]) -> None:
        """Count in what every process of the run has cost, this one among them."""
        self._processes = processes

    @property
    def peak_memory_bytes(self) -> int:
        """The largest resident size of a process."""
        return max(process.peak_memory_bytes for process in (*self._processes, self.of_process))

    @property
    def moved_bytes(self) -> tuple[int | None, int | None]:
        """Read and written, by calls of the processes; None where the system does not count them."""
        parts = self._processes if len(self._processes) > 1 else [self.of_process]
        return known_sum([part.read_bytes for part in parts]), known_sum([part.written_bytes for part in parts])


def known_sum(counts: list[int | None]) -> int | None:
    """The sum, None if any is unknown."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


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
