"""Tensor by tensor, band by band: what needs no calibration, and what is only copied."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from itertools import cycle, starmap
from typing import Any, TypeAlias, TypeVar

import torch

from tsenor_cli.checkpoint.layouts import from_matrices, to_matrices
from tsenor_cli.checkpoint.plan import Plan, TensorPlan, bands
from tsenor_cli.checkpoint.writer import OutputShards
from tsenor_cli.device import CPU
from tsenor_cli.errors import InputRefused
from tsenor_cli.observer import Observer
from tsenor_cli.pruners.base import Pruner, SolveMask
from tsenor_cli.report.build import Tally, kept_record
from tsenor_cli.report.records import TensorRecord

T = TypeVar("T")
_Pruned: TypeAlias = tuple[torch.Tensor, Tally]

GPU_BAND_BYTES = 64 * 2**20
IN_FLIGHT = 3  # bands on a GPU at a time


def copy_tensor(item: TensorPlan, shards: OutputShards, observer: Observer) -> TensorRecord:
    """Byte for byte."""
    with shards.place_of(item.tensor) as place:
        for chunk in item.tensor.chunks():
            place.write(chunk)
            observer.advanced(item.tensor.name, len(chunk))
    return kept_record(item, place.sha256())


def prune_bands(
    item: TensorPlan,
    pruner: Pruner,
    solver: SolveMask,
    shards: OutputShards,
    observer: Observer,
    device: torch.device = CPU,
) -> TensorRecord:
    """Prune and write a tensor a band at a time, by a method that can.

    On a GPU several bands are under way at once, each in a stream of its own: while one is solved, others are read,
    copied there and back, and written.
    """
    assert item.layout is not None
    assert item.choice is not None
    tally, m = Tally(), item.choice.pattern.m
    with shards.place_of(item.tensor) as place:
        if device.type == "cpu":
            results: Iterator[_Pruned] = starmap(
                partial(_prune_band, item, pruner, solver), bands(item.tensor, item.layout, m)
            )
        else:
            parts = bands(item.tensor, item.layout, m, GPU_BAND_BYTES)
            streams = cycle(_streams(device))
            numbered = ((stream, *part) for stream, part in zip(streams, parts, strict=False))
            results = _some_ahead(partial(_prune_band_on_gpu, item, pruner, solver, device), numbered, IN_FLIGHT)
        for pruned, part in results:
            place.write(pruned.view(-1).view(torch.uint8).numpy().data)
            observer.advanced(item.tensor.name, pruned.nbytes)
            tally.merge(part)
    return tally.record(item, place.sha256())


def _prune_band(item: TensorPlan, pruner: Pruner, solver: SolveMask, first: int, last: int) -> _Pruned:
    return _prune(item, pruner, solver, item.tensor.read(first, last))


@cache
def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    """A few that stay: torch keeps freed memory for the stream that had it."""
    return [torch.cuda.Stream(device) for _ in range(IN_FLIGHT)]  # type: ignore[no-untyped-call]


def _prune_band_on_gpu(
    item: TensorPlan,
    pruner: Pruner,
    solver: SolveMask,
    device: torch.device,
    stream: torch.cuda.Stream,
    first: int,
    last: int,
) -> _Pruned:
    with torch.cuda.stream(stream):
        band = item.tensor.read(first, last, pinned=True).to(device, non_blocking=True)
        pruned, tally = _prune(item, pruner, solver, band)
        back = torch.empty(pruned.shape, dtype=pruned.dtype, pin_memory=True).copy_(pruned, non_blocking=True)
        stream.synchronize()
    return back, tally


def _prune(item: TensorPlan, pruner: Pruner, solver: SolveMask, band: torch.Tensor) -> _Pruned:
    """The band as it goes to disk, and what happened to it."""
    assert item.layout is not None
    check_finite(item, band)
    weight, tally = to_matrices(band, item.layout), Tally()
    started = time.perf_counter()
    layer = pruner.prune(weight, solver)
    tally.add(weight, layer, time.perf_counter() - started)
    return from_matrices(layer.weight, item.layout).contiguous(), tally


def _some_ahead(work: Callable[..., T], arguments: Iterable[tuple[Any, ...]], count: int) -> Iterator[T]:
    """The results of `work` in order, with `count` of them under way while one is used."""
    with ThreadPoolExecutor(count) as pool:
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


def check_finite(item: TensorPlan, weight: torch.Tensor) -> None:
    """Refuse NaN and infinity, which cannot be ranked."""
    if not _is_finite(weight):
        raise InputRefused(
            f"{item.tensor.name} has NaN or infinite weights",
            "fetch the checkpoint again, or copy such tensors as they are with --allow-nonfinite",
            code="nonfinite-weights",
        )


def leave_nonfinite(plan: Plan) -> Plan:
    """The plan with every tensor kept that has NaN or infinite weights; all that are to be pruned are read for that."""
    return replace(plan, tensors=tuple(map(_kept_if_nonfinite, plan.tensors)))


def _kept_if_nonfinite(item: TensorPlan) -> TensorPlan:
    if not item.pruned:
        return item
    assert item.layout is not None
    assert item.choice is not None
    parts = bands(item.tensor, item.layout, item.choice.pattern.m)
    if all(_is_finite(item.tensor.read(first, last)) for first, last in parts):
        return item
    return replace(item, reason="it has NaN or infinite weights")


def _is_finite(weight: torch.Tensor) -> bool:
    return all(map(math.isfinite, torch.stack(torch.aminmax(weight)).tolist()))  # NaN travels through min and max
