"""Tensor by tensor, band by band: what needs no calibration, and what is only copied.

While some bands are solved the next ones are read and the last ones hashed and written; a shard that is complete is put
to disk meanwhile. In memory are a few bands, whatever the size of the checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, cycle
from typing import TypeAlias

import torch

from tsenor_cli.checkpoint.layouts import from_matrices, to_matrices
from tsenor_cli.checkpoint.maskfile import pack_mask
from tsenor_cli.checkpoint.plan import Plan, TensorPlan, bands
from tsenor_cli.checkpoint.writer import OutputShards, Place, as_bytes
from tsenor_cli.errors import InputRefused
from tsenor_cli.kernels.threads import limited
from tsenor_cli.observer import Observer
from tsenor_cli.overlap import ahead
from tsenor_cli.pruners.base import Pruner, SolveMask, all_finite
from tsenor_cli.report.build import Tally, kept_record
from tsenor_cli.report.records import TensorRecord
from tsenor_cli.specs import NMPattern

GPU_BAND_BYTES = 64 * 2**20
IN_FLIGHT = 3  # bands that are pruned at a time: while one waits for a thread, or for the GPU, others have work
READ_AHEAD = WRITE_BEHIND = 2  # bands


_Content: TypeAlias = bytearray | memoryview


@dataclass(frozen=True)
class _Part:
    """A band of a tensor that is pruned, rows `first` to `last`; or of one that is kept, bytes."""

    item: TensorPlan
    first: int
    last: int
    ends: bool  # the tensor ends with it


_Pruned: TypeAlias = tuple[_Part, _Content, _Content | None, Tally]  # as it goes to disk, its mask, what happened to it


class Streaming:
    """Prunes and copies tensors by way of a few bands in memory.

    Args:
        pruners: by name of the method; such as see no inputs.
        solvers: by pattern.
        device: where masks are solved.
    """

    def __init__(
        self,
        pruners: Mapping[str, Pruner],
        solvers: Mapping[NMPattern, SolveMask],
        device: torch.device,
        shards: OutputShards,
        observer: Observer,
    ) -> None:
        self._pruners = pruners
        self._solvers = solvers
        self._device = device
        self._shards = shards
        self._observer = observer

    def run(self, items: Iterable[TensorPlan]) -> Iterator[TensorRecord]:
        """Prune or copy tensors in this order, best that of the files, and give the record of each that is written.

        Several bands are under way at once, on a GPU each in a stream of its own.
        """
        if self._device.type == "cpu":
            parts = chain.from_iterable(map(_parts, items))
            threads = torch.get_num_threads()
            at_once = min(IN_FLIGHT, threads)
            prune = limited(self._prune, threads // at_once)
            read = ahead(self._read, ((part,) for part in parts), READ_AHEAD)
            pruned = ahead(prune, read, at_once - 1, threads=at_once)
        else:
            parts = chain.from_iterable(map(partial(_parts, nbytes=GPU_BAND_BYTES), items))
            streamed = zip(cycle(_streams(self._device)), parts, strict=False)
            pruned = ahead(self._prune_on_gpu, streamed, IN_FLIGHT, threads=IN_FLIGHT)
        with _Writing(self._shards) as writing:
            for part, nbytes, record in ahead(writing.write, pruned, WRITE_BEHIND):
                self._observer.advanced(part.item.tensor.name, nbytes)
                if record is not None:
                    yield record

    def _read(self, part: _Part) -> tuple[_Part, torch.Tensor | _Content]:
        tensor = part.item.tensor
        return part, (tensor.read if part.item.pruned else tensor.read_bytes)(part.first, part.last)

    def _prune(self, part: _Part, content: torch.Tensor | _Content) -> _Pruned:
        if not isinstance(content, torch.Tensor):
            return part, content, None, Tally()
        pruned, mask, tally = self._prune_band(part.item, content)
        return part, as_bytes(pruned), None if mask is None else as_bytes(mask), tally

    def _prune_on_gpu(self, stream: torch.cuda.Stream, part: _Part) -> _Pruned:
        if not part.item.pruned:
            return self._prune(*self._read(part))
        with torch.cuda.stream(stream):
            band = part.item.tensor.read(part.first, part.last, pinned=True).to(self._device, non_blocking=True)
            pruned, mask, tally = self._prune_band(part.item, band)
            back, mask_back = _brought_back(pruned), None if mask is None else _brought_back(mask)
            stream.synchronize()
        return part, as_bytes(back), None if mask_back is None else as_bytes(mask_back), tally

    def _prune_band(self, item: TensorPlan, band: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, Tally]:
        """The band as it is on disk, its packed mask if that is saved, and what happened to it."""
        assert item.layout is not None
        assert item.choice is not None
        weight, tally = to_matrices(band, item.layout), Tally()
        started = time.perf_counter()
        try:
            layer = self._pruners[item.choice.method].prune(weight, self._solvers[item.choice.pattern])
        except InputRefused:
            check_finite(item, band)  # says which tensor
            raise
        tally.add(weight, layer, time.perf_counter() - started)
        saved = self._shards.mask_of(item.tensor) is not None
        mask = pack_mask(from_matrices(layer.solution.mask, item.layout)) if saved else None
        return from_matrices(layer.weight, item.layout).contiguous(), mask, tally


class _Writing(ExitStack):
    """Puts parts into their places, in order; leaving it closes the file of a tensor that is not complete."""

    def __init__(self, shards: OutputShards) -> None:
        super().__init__()
        self._shards = shards
        self._places: tuple[Place, Place | None] | None = None
        self._tally = Tally()

    def write(
        self, part: _Part, content: _Content, mask: _Content | None, tally: Tally
    ) -> tuple[_Part, int, TensorRecord | None]:
        """The part, its size, and the record of its tensor if that is complete."""
        if self._places is None:
            self._places, self._tally = self.enter_context(self._shards.places_of(part.item.tensor)), Tally()
        place, mask_place = self._places
        place.write(content)
        if mask_place is not None:
            assert mask is not None
            mask_place.write(mask)
        self._tally.merge(tally)
        if not part.ends:
            return part, len(content), None
        item, sha256 = part.item, place.sha256()
        mask_sha256 = None if mask_place is None else mask_place.sha256()
        self.close()
        self._places = None
        record = self._tally.record(item, sha256, mask_sha256) if item.pruned else kept_record(item, sha256)
        return part, len(content), record


def _parts(item: TensorPlan, nbytes: int | None = None) -> Iterator[_Part]:
    if item.pruned:
        assert item.layout is not None
        assert item.choice is not None
        found = bands(item.tensor, item.layout, item.choice.pattern.m, nbytes)
    else:
        found = item.tensor.pieces() or [(0, 0)]
    return (_Part(item, first, last, last == found[-1][1]) for first, last in found)


def _brought_back(tensor: torch.Tensor) -> torch.Tensor:
    """In memory, once the stream has got so far."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


@cache
def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    """A few that stay: torch keeps freed memory for the stream that had it."""
    return [torch.cuda.Stream(device) for _ in range(IN_FLIGHT)]  # type: ignore[no-untyped-call]


def check_finite(item: TensorPlan, weight: torch.Tensor) -> None:
    """Refuse NaN and infinity, which cannot be ranked."""
    if not all_finite(weight):
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
    if all(all_finite(item.tensor.read(first, last)) for first, last in parts):
        return item
    return replace(item, reason="it has NaN or infinite weights")
