"""Layer by layer: what a calibrated method prunes, with every layer fed by the pruned ones before it.

One decoder layer is in memory at a time. It runs once as it is, to see the inputs of its weights; its weights are
pruned and written; it is loaded again with the pruned ones and runs a second time, for the layers behind it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch

from tsenor_cli.calibration.replay import Replay, batches, return_freed_memory
from tsenor_cli.calibration.statistics import Collector
from tsenor_cli.checkpoint.adapter.skeleton import Skeleton
from tsenor_cli.checkpoint.layouts import Layout, from_matrices, matrix_size, to_matrices
from tsenor_cli.checkpoint.maskfile import pack_mask, packed_shape, unpack_mask
from tsenor_cli.checkpoint.plan import Plan, TensorPlan
from tsenor_cli.checkpoint.site import Site
from tsenor_cli.checkpoint.writer import OutputShards, as_bytes
from tsenor_cli.device import CPU
from tsenor_cli.distributed import Team
from tsenor_cli.errors import InputRefused, TsenorError
from tsenor_cli.observer import Observer
from tsenor_cli.pruners.base import Calibrated, InputStats, PrunedLayer, Pruner, SolveMask, all_finite
from tsenor_cli.pruners.error import assess
from tsenor_cli.pruners.factor import Damping
from tsenor_cli.pruners.magnitude import Magnitude
from tsenor_cli.report.build import Tally
from tsenor_cli.report.records import TensorRecord
from tsenor_cli.specs import NMPattern
from tsenor_cli.streaming import check_finite


class _Unit(NamedTuple):
    """One matrix of a tensor that is to be pruned."""

    item: TensorPlan
    number: int
    site: Site | None

    @property
    def size(self) -> tuple[int, int]:
        assert self.item.layout is not None
        return matrix_size(self.item.tensor.shape, self.item.layout)

    @property
    def cost(self) -> float:
        """In about floating-point operations, to share the work out."""
        out, inputs = self.size
        assert self.item.choice is not None
        updates, factorisations = {"sparsegpt": (2, 1), "alps": (60, 10)}.get(self.item.choice.method, (0, 0))
        return 100 * out * inputs + updates * out * inputs**2 + factorisations * inputs**3


class _Pruned(NamedTuple):
    """What has become of a matrix, on the CPU."""

    unit: _Unit
    weight: torch.Tensor  # [out, in]
    mask: torch.Tensor | None  # packed, if masks are saved and this process has use for it
    tally: Tally


class Layerwise:
    """One run over the decoder layers of a checkpoint.

    Args:
        pruners: by name of the method.
        solvers: by pattern.
        device: where layers run and weights are pruned.
        few_tokens: what is done to an expert with fewer tokens than inputs: "magnitude", or "error".
        team: the processes that do it together: each runs layers on batches of its own, prunes matrices of its own,
            and gets all of a pruned layer to run it for the next one.
        writers: which of them writes a tensor.
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
        team: Team,
        writers: Mapping[str, int],
    ) -> None:
        self._plan = plan
        self._pruners = pruners
        self._solvers = solvers
        self._device = device
        self._few_tokens = few_tokens
        self._shards = shards
        self._observer = observer
        self._team = team
        self._writers = writers

    def run(self, windows: torch.Tensor, spill_to: Path | None, done: Collection[str] = ()) -> Iterator[TensorRecord]:
        """Prune and write what is planned in the decoder layers, up to the last that still needs calibration.

        Gives the records of what this process has written.

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
        everything = batches(windows)
        passes = -(-len(everything) // self._team.size)
        with Replay(skeleton, everything[self._team.rank :: self._team.size], spill_to) as replay:
            skeleton.drop_outside()  # embeddings have been looked up, and the head is not needed
            for index in range(last + 1):
                self._observer.entered(f"layer {index + 1} of {len(skeleton.layers)}")
                items = [item for item in self._plan.pruned if item.layer == index]
                left = [item for item in items if item.tensor.name not in done]
                units = [_Unit(item, number, site) for item in left for number, site in enumerate(_sites(item))]
                replaced = {i.tensor.name: self._shards.read(i.tensor) for i in items if i.tensor.name in done}
                owners, stats = self._statistics(skeleton, replay, index, units, passes)
                for item, pruned, record in self._prune_layer(units, owners, stats):
                    replaced[item.tensor.name] = pruned
                    if record is not None:
                        yield record
                del owners, stats  # before the next layer's: Gram matrices are large
                if index < last:
                    replay.advance(index, skeleton.load_layer(index, replaced))
                    skeleton.drop_layer(index)

    def _statistics(
        self, skeleton: Skeleton, replay: Replay, index: int, units: list[_Unit], passes: int
    ) -> tuple[dict[_Unit, int], dict[Site, InputStats]]:
        """Run the layer as it is: which process prunes what, and what was seen of the inputs of this one's weights."""
        calibrated = [unit for unit in units if unit.item.calibrated]
        if not calibrated:
            return self._owners(units, {}, {}), {}
        gram = any(self._pruner(unit.item).needs == "gram" for unit in calibrated)
        sites = (unit.item.site for unit in calibrated if unit.item.site is not None)
        collector = Collector(skeleton.model, sites, gram=gram, team=self._team, device=self._device)
        layer = skeleton.load_layer(index)
        for batch in range(passes):
            if batch < len(replay):
                with collector.watching():
                    replay.run(index, layer, batch)
            collector.share()
        skeleton.drop_layer(index)
        experts = {unit: collector.home(unit.site) for unit in calibrated if unit.site and unit.site.expert is not None}
        owners = self._owners(units, collector.leaders, experts)
        leading = {collector.leaders.get(unit.site, unit.site): rank for unit, rank in owners.items() if unit.site}
        return owners, collector.results(leading)

    def _owners(
        self, units: list[_Unit], leaders: Mapping[Site, Site], settled: Mapping[_Unit, int]
    ) -> dict[_Unit, int]:
        """Which process prunes which matrix: those with the same input together, the costliest first, to the idlest."""
        together: dict[Hashable, list[_Unit]] = defaultdict(list)
        for unit in units:
            if unit not in settled:
                seen = unit.item.calibrated and unit.site is not None
                together[leaders.get(unit.site, unit.site) if seen and unit.site else unit].append(unit)
        owners, loads = dict(settled), [0.0] * self._team.size
        for unit, rank in settled.items():
            loads[rank] += unit.cost
        for group in sorted(together.values(), key=lambda group: -sum(unit.cost for unit in group)):
            rank = loads.index(min(loads))
            loads[rank] += sum(unit.cost for unit in group)
            owners |= dict.fromkeys(group, rank)
        return owners

    def _prune_layer(
        self, units: list[_Unit], owners: Mapping[_Unit, int], stats: dict[Site, InputStats]
    ) -> Iterator[tuple[TensorPlan, torch.Tensor, TensorRecord | None]]:
        """Each tensor as it is on disk, and its record if this process has written it.

        Alone, they are pruned and written one by one; in a team all have pruned before they exchange what they have.
        """
        pruned = self._prune([unit for unit in units if owners[unit] == self._team.rank], stats)
        if self._team.size > 1:
            pruned = self._exchanged(list(pruned), units, owners)
        for item, parts in groupby(pruned, key=lambda part: part.unit.item):
            yield item, *self._put_together(item, parts)

    def _prune(self, units: list[_Unit], stats: dict[Site, InputStats]) -> Iterator[_Pruned]:
        """Prune matrices, and take statistics out of `stats` that no later one of them needs."""
        last = {id(stats[unit.site]): unit for unit in units if unit.site in stats}
        for item, group in groupby(units, key=attrgetter("item")):
            return_freed_memory()
            assert item.layout is not None
            tensor = item.tensor.read()
            check_finite(item, tensor)
            matrices = to_matrices(tensor, item.layout).reshape(-1, *matrix_size(item.tensor.shape, item.layout))
            for unit in group:
                tally, started = Tally(), time.perf_counter()
                there = matrices[unit.number].to(self._device)
                layer, fallback = self._prune_matrix(item, unit.site, there, stats)
                tally.add(there, layer, time.perf_counter() - started, fallback)
                saved = self._shards.mask_of(item.tensor) is not None
                mask = pack_mask(layer.solution.mask).to(CPU) if saved else None
                yield _Pruned(unit, layer.weight.to(CPU), mask, tally)
                for site in [site for site, found in stats.items() if last.get(id(found)) == unit]:
                    del stats[site]

    def _exchanged(self, own: list[_Pruned], units: list[_Unit], owners: Mapping[_Unit, int]) -> Iterator[_Pruned]:
        """What all processes have pruned, in the order of `units`."""
        mine = iter(own)
        tallies = [iter(part) for part in self._team.gather([pruned.tally for pruned in own])]
        for unit in units:
            owner, tensor = owners[unit], unit.item.tensor
            pruned = next(mine) if owner == self._team.rank else None
            like = unit.size, tensor.torch_dtype
            given = self._team.give(pruned and pruned.weight, like, CPU, owner, range(self._team.size))
            assert given is not None
            mask = None
            if self._shards.mask_of(tensor) is not None:
                like = packed_shape(unit.size), torch.uint8
                mask = self._team.give(pruned and pruned.mask, like, CPU, owner, [self._writers[tensor.name]])
            yield _Pruned(unit, given, mask, next(tallies[owner]))

    def _put_together(self, item: TensorPlan, parts: Iterable[_Pruned]) -> tuple[torch.Tensor, TensorRecord | None]:
        """The pruned tensor as it is on disk, and its record if this process writes it."""
        assert item.layout is not None
        shape = to_matrices(torch.empty(item.tensor.shape, device="meta"), item.layout).shape
        pruned, tally = torch.empty(shape, dtype=item.tensor.torch_dtype), Tally()
        matrices, masks = pruned.view(-1, *shape[-2:]), []
        for part in parts:
            matrices[part.unit.number].copy_(part.weight)
            masks.append(part.mask)
            tally.merge(part.tally)
        result = from_matrices(pruned, item.layout).contiguous()
        if self._writers[item.tensor.name] != self._team.rank:
            return result, None
        with self._shards.places_of(item.tensor) as (place, mask_place):
            place.write(as_bytes(result))
            if mask_place is not None:
                mask_place.write(as_bytes(_mask_on_disk(masks, shape, item.layout)))
        self._observer.advanced(item.tensor.name, item.tensor.nbytes)
        return result, tally.record(item, place.sha256(), None if mask_place is None else mask_place.sha256())

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
            found = Magnitude().prune(weight, solver)
            return replace(found, calibrated=_of_few_tokens(pruner, weight, found, seen)), why
        if seen is None:
            raise InputRefused(f"{item.tensor.name}: nothing went through {site.module}", "leave it out with --ignore")
        try:
            return pruner.prune(weight, solver, seen), None
        except TsenorError as error:
            if error.code == "nonfinite-inputs":
                self._blame_weights(item)
            raise type(error)(f"{item.tensor.name}: {error.message}", error.remedy, code=error.code) from error

    def _blame_weights(self, item: TensorPlan) -> None:
        """Refuse the first tensor that has NaN or infinite weights, of those that the inputs of `item` come from."""
        for other in self._plan.tensors:
            before = other.layer is None or (item.layer is not None and other.layer <= item.layer)
            if before and other.tensor.torch_dtype.is_floating_point and not all_finite(other.tensor.read().float()):
                raise InputRefused(
                    f"{other.tensor.name} has NaN or infinite weights, and so have the inputs of {item.tensor.name}",
                    "fetch the checkpoint again, or use --method magnitude with --allow-nonfinite",
                    code="nonfinite-weights",
                )

    def _pruner(self, item: TensorPlan) -> Pruner:
        assert item.choice is not None
        return self._pruners[item.choice.method]


def _of_few_tokens(pruner: Pruner, weight: torch.Tensor, found: PrunedLayer, seen: InputStats | None) -> Calibrated:
    """What the tokens that an expert did see say of it, though `pruner` was not asked."""
    if pruner.needs != "gram":
        return Calibrated(seen.tokens if seen else 0)
    if seen is None:
        return Calibrated(0, 0.0, 0.0, 0.0)
    return replace(assess(weight, found.solution.mask, found.weight, seen, Damping(0.0, 0)), damping=None)


def _mask_on_disk(packed: list[torch.Tensor | None], shape: torch.Size, layout: Layout) -> torch.Tensor:
    """The packed mask of a tensor as it is on disk, of those of its matrices; `shape` is that of all, [.., out, in]."""
    mask = torch.empty(shape, dtype=torch.bool)
    for matrix, part in zip(mask.view(-1, *shape[-2:]), packed, strict=True):
        assert part is not None, "the writer of a tensor gets its masks"
        matrix.copy_(unpack_mask(part, matrix.shape))
    return pack_mask(from_matrices(mask, layout))


def _sites(item: TensorPlan) -> list[Site | None]:
    """Where the input of each matrix of a tensor can be seen."""
    assert item.layout is not None
    count = item.tensor.parameters // prod(matrix_size(item.tensor.shape, item.layout))
    if item.site is None or not item.site.fused or item.site.expert is not None:
        return [item.site] * count
    return [item.site.of_expert(number) for number in range(count)]
