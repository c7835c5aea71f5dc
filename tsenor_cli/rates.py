"""What this machine gets done, measured in a few seconds, with the code that a run uses."""

from __future__ import annotations

import hashlib
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

import torch

from tsenor_cli.calibration.statistics import Accumulator
from tsenor_cli.checkpoint.plan import BAND_BYTES, Plan
from tsenor_cli.checkpoint.shard import COPY_BYTES, DiskTensor
from tsenor_cli.checkpoint.writer import SETTLE_BYTES, settle
from tsenor_cli.device import CPU
from tsenor_cli.forecast import Rates
from tsenor_cli.kernels import syrk
from tsenor_cli.pruners.base import SolveMask
from tsenor_cli.pruners.magnitude import Magnitude
from tsenor_cli.report.build import Tally
from tsenor_cli.specs import NMPattern

_TURNS = 3  # of reading and writing: a disk that others use changes its speed from second to second
_TURN_S = 1.0  # to read, and to write
_SAMPLE_BYTES = 2**29  # to write in a turn at most, to a file that is never seen
_TIMES = 10  # to do what takes milliseconds; others' work on the machine disturbs it

_Turn: TypeAlias = tuple[int, float]  # bytes, seconds
_Places: TypeAlias = Iterator[tuple[DiskTensor, int, int]]


def measure_rates(plan: Plan, output: Path, solvers: Mapping[NMPattern, SolveMask]) -> Rates:
    """The rates of this machine's CPU and of the disk that `output` is to be on; nothing of it stays.

    Args:
        plan: its patterns, and the files to read from.
        output: where it is to go.
        solvers: for each pattern.
    """
    cores = torch.get_num_threads()
    patterns = {item.choice.pattern for item in plan.pruned if item.choice is not None}
    read, write, but = _disk_rates(plan, output)
    return Rates(
        where=f"measured on this machine, {cores} threads{but}",
        solve={(pattern.m, pattern.transposable): _solve_rate(pattern, solvers[pattern]) for pattern in patterns},
        **_calibration_rates(plan),
        read=read,
        write=write,
        hash=_hash_rate(),
        cores=cores,
        measured=True,
    )


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest; the first time may compile, or read what was compiled."""
    seconds = []
    for _ in range(_TIMES):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _solve_rate(pattern: NMPattern, solver: SolveMask) -> float:
    """Of a band as streaming cuts them, from weights to what is written and counted."""
    side = 1024 // pattern.m * pattern.m
    band = torch.randn(BAND_BYTES // 2 // side // pattern.m * pattern.m, side).to(torch.bfloat16)

    def work() -> None:
        Tally().add(band, Magnitude().prune(band, solver), 0.0)

    return band.numel() / _best(work)


def _calibration_rates(plan: Plan) -> dict[str, float]:
    """Of products of matrices, if any are needed."""
    if not plan.calibrated:
        return {"matmul": 1.0, "layers": 1.0, "gram": 1.0}
    side, dtype = 1024, next(item.tensor.torch_dtype for item in plan.pruned if item.calibrated)
    wide, sums = torch.randn(side, side), Accumulator(side, CPU, gram=True)
    own = wide.to(dtype)
    inputs = own if syrk.takes(own) else wide
    return {
        "matmul": 2 * side**3 / _best(lambda: wide @ wide),
        "layers": 2 * side**3 / _best(lambda: own @ own),
        "gram": side**3 / _best(lambda: sums.add(inputs)),
    }


def _hash_rate() -> float:
    block = bytes(COPY_BYTES)
    return len(block) / _best(lambda: hashlib.sha256(block))


def _disk_rates(plan: Plan, output: Path) -> tuple[float, float, str]:
    """Of reading and of writing, by turns; and what is to be said of them."""
    places, but = _places(plan), ""
    if plan.checkpoint.fetched_bytes:
        places, but = iter(()), ", as if the hub were never waited for"
    read: list[_Turn] = []
    written: list[_Turn] = []
    for _ in range(_TURNS):
        read.append(_read(places))
        try:
            written.append(_write(output, min(plan.checkpoint.nbytes, _SAMPLE_BYTES)))
        except OSError as error:
            return _rate(read), _rate(read), f"{but}; writing taken to be as fast as reading ({error.strerror})"
    return _rate(read), _rate(written), but


def _rate(turns: Sequence[_Turn]) -> float:
    nbytes = sum(done for done, _ in turns)
    return nbytes / sum(seconds for _, seconds in turns) if nbytes else math.inf


def _places(plan: Plan) -> _Places:
    """All over the files: what of them is in memory already is so for the run, too."""
    places = [(item.tensor, *piece) for item in plan.tensors for piece in item.tensor.pieces()]
    random.Random(0).shuffle(places)  # noqa: S311  (nothing secret)
    return iter(places)


def _read(places: _Places) -> _Turn:
    done, started = 0, time.perf_counter()
    for tensor, first, last in places:
        done += len(tensor.read_bytes(first, last))
        if time.perf_counter() - started > _TURN_S:
            break
    return done, time.perf_counter() - started


def _write(output: Path, nbytes: int) -> _Turn:
    """To the disk, through the system's cache, of a file without a name; put to disk behind the back, as in a run."""
    place = next(parent for parent in output.absolute().parents if parent.exists())
    block, done, started, settling = os.urandom(COPY_BYTES), 0, time.perf_counter(), []
    with tempfile.TemporaryFile(dir=place, buffering=0) as file, ThreadPoolExecutor(1) as syncer:
        while done < nbytes and time.perf_counter() - started < _TURN_S:
            first = done
            while done - first < min(SETTLE_BYTES, nbytes):
                done += file.write(block)
            settling.append(syncer.submit(settle, cast("BinaryIO", file), [(first, done - first)]))
        for each in settling:
            each.result()
    return done, time.perf_counter() - started
