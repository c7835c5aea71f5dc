"""Layer by layer: what a calibrated method prunes, with every layer fed by the pruned ones before it.

One decoder layer is in memory at a time. It runs once as it is, to see the inputs of its weights; its weights are
pruned and written; it is loaded again with the pruned ones and runs a second time, for the layers behind it.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Collection, Iterator, Mapping
from math import prod
from pathlib import Path

import torch

from tsenor_cli.calibration.replay import Replay, batches
from tsenor_cli.calibration.statistics import Collector
from tsenor_cli.checkpoint.adapter.skeleton import Skeleton
from tsenor_cli.checkpoint.layouts import from_matrices, matrix_size, to_matrices
from tsenor_cli.checkpoint.plan import Plan, TensorPlan
from tsenor_cli.checkpoint.site import Site
from tsenor_cli.checkpoint.writer import OutputShards
from tsenor_cli.errors import InputRefused, TsenorError
from tsenor_cli.observer import Observer
from tsenor_cli.pruners.base import InputStats, PrunedLayer, Pruner, SolveMask
from tsenor_cli.pruners.magnitude import Magnitude
from tsenor_cli.report.build import Tally
from tsenor_cli.report.records import TensorRecord
from tsenor_cli.specs import NMPattern
from tsenor_cli.streaming import check_finite


class Layerwise:
    """One run over the decoder layers of a checkpoint.

    Args:
        pruners: by name of the method.
        solvers: by pattern.
        device: where layers run and weights are pruned.
        few_tokens: what is done to an expert with fewer tokens than inputs: "magnitude", or "error".
    """

    def __init__(
        self,
        plan: Plan,
        pruners: Mapping[str, Pruner],
        solvers: Mapping[NMPattern, SolveMask],
        device: torch.device,
        few_tokens: str,
        shards: OutputShards,
        observer: Observer,
    ) -> None:
        self._plan = plan
        self._pruners = pruners
        self._solvers = solvers
        self._device = device
        self._few_tokens = few_tokens
        self._shards = shards
        self._observer = observer

    def run(self, windows: torch.Tensor, spill_to: Path | None, done: Collection[str] = ()) -> Iterator[TensorRecord]:
        """Prune and write what is planned in the decoder layers, up to the last that still needs calibration.

        Args:
            windows: int64 [samples, tokens].
            spill_to: a directory for the hidden states; None keeps them in memory.
            done: names of tensors that are pruned and written already; their layers run with what is there.
        """
        skeleton = Skeleton(self._plan.checkpoint, self._device)
        last = max(
            item.layer
            for item in self._plan.tensors
            if item.calibrated and item.layer is not None and item.tensor.name not in done
        )
        with Replay(skeleton, batches(windows), spill_to) as replay:
            skeleton.drop_outside()  # embeddings have been looked up, and the head is not needed
            for index in range(last + 1):
                self._observer.entered(f"layer {index + 1} of {len(skeleton.layers)}")
                items = [item for item in self._plan.pruned if item.layer == index]
                left = [item for item in items if item.tensor.name not in done]
                replaced = {i.tensor.name: self._shards.read(i.tensor) for i in items if i.tensor.name in done}
                for item, pruned, record in self._prune_layer(left, self._statistics(skeleton, replay, index, left)):
                    replaced[item.tensor.name] = pruned
                    yield record
                if index < last:
                    replay.advance(index, skeleton.load_layer(index, replaced))
                    skeleton.drop_layer(index)

    def _statistics(
        self, skeleton: Skeleton, replay: Replay, index: int, items: list[TensorPlan]
    ) -> dict[Site, InputStats]:
        """Run the layer as it is and see what its weights are given."""
        calibrated = [item for item in items if item.calibrated]
        if not calibrated:
            return {}
        gram = any(self._pruner(item).needs == "gram" for item in calibrated)
        collector = Collector(skeleton.model, (item.site for item in calibrated if item.site is not None), gram=gram)
        layer = skeleton.load_layer(index)
        for batch in range(len(replay)):
            with collector.watching():
                replay.run(index, layer, batch)
        skeleton.drop_layer(index)
        return collector.results()

    def _prune_layer(
        self, items: list[TensorPlan], stats: dict[Site, InputStats]
    ) -> Iterator[tuple[TensorPlan, torch.Tensor, TensorRecord]]:
        """Prune the tensors of a layer, and drop statistics that no later one of them needs."""
        for position, item in enumerate(items):
            _return_freed_memory()
            yield item, *self._prune(item, stats)
            later = {id(stats[site]) for other in items[position + 1 :] for site in _sites(other) if site in stats}
            stats = {site: found for site, found in stats.items() if id(found) in later}

    def _prune(self, item: TensorPlan, stats: dict[Site, InputStats]) -> tuple[torch.Tensor, TensorRecord]:
        """The pruned tensor as it is on disk, and its record; it is written, too."""
        assert item.layout is not None
        tensor = item.tensor.read()
        check_finite(item, tensor)
        weight = to_matrices(tensor, item.layout)
        matrices = weight.reshape(-1, *weight.shape[-2:])
        pruned = torch.empty_like(matrices)
        tally = Tally()
        for site, matrix, target in zip(_sites(item), matrices, pruned, strict=True):
            started = time.perf_counter()
            there = matrix.to(self._device)
            layer, fallback = self._prune_matrix(item, site, there, stats)
            tally.add(there, layer, time.perf_counter() - started, fallback)
            target.copy_(layer.weight)
        result = from_matrices(pruned.view_as(weight), item.layout).contiguous()
        with self._shards.place_of(item.tensor) as place:
            place.write(result.view(-1).view(torch.uint8).numpy().data)
        self._observer.advanced(item.tensor.name, item.tensor.nbytes)
        return result, tally.record(item, place.sha256())

    def _prune_matrix(
        self, item: TensorPlan, site: Site | None, weight: torch.Tensor, stats: dict[Site, InputStats]
    ) -> tuple[PrunedLayer, str | None]:
        """One matrix [out, in], and why another method than the chosen one was taken, if so."""
        assert item.choice is not None
        solver, pruner = self._solvers[item.choice.pattern], self._pruner(item)
        if not item.calibrated:
            return pruner.prune(weight, solver), None
        assert site is not None
        seen = stats.get(site)
        tokens, inputs = seen.tokens if seen else 0, weight.shape[-1]
        if site.fused and tokens < inputs:
            why = f"expert {site.expert} saw {tokens} tokens, fewer than its {inputs} inputs"
            if self._few_tokens == "error":
                raise InputRefused(
                    f"{item.tensor.name}: {why}", "give more text, or --few-tokens magnitude", code="too-few-tokens"
                )
            return Magnitude().prune(weight, solver), why
        if seen is None:
            raise InputRefused(f"{item.tensor.name}: nothing went through {site.module}", "leave it out with --ignore")
        try:
            return pruner.prune(weight, solver, seen), None
        except TsenorError as error:
            raise type(error)(f"{item.tensor.name}: {error.message}", error.remedy, code=error.code) from error

    def _pruner(self, item: TensorPlan) -> Pruner:
        assert item.choice is not None
        return self._pruners[item.choice.method]


def _return_freed_memory() -> None:
    """Let the C library give back what has been freed: else the holes that tensors leave grow layer by layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc has it
    if trim is not None:
        trim(0)


def _sites(item: TensorPlan) -> list[Site | None]:
    """Where the input of each matrix of a tensor can be seen."""
    assert item.layout is not None
    count = item.tensor.parameters // prod(matrix_size(item.tensor.shape, item.layout))
    if item.site is None or not item.site.fused or item.site.expert is not None:
        return [item.site] * count
    return [item.site.of_expert(number) for number in range(count)]
