"""What the inputs of the weights look like: Gram matrices, norms, and how many tokens were seen.

Products of 16-bit numbers are exact in float32; each batch is summed in float32 and added to a float64 total
(docs/decisions/0011). Modules that are given the same tensor (q, k and v; gate and up) share one
set of statistics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from math import prod
from typing import Any

import torch
from torch import nn

from tsenor_cli.checkpoint.site import Site
from tsenor_cli.device import CPU
from tsenor_cli.distributed import Team
from tsenor_cli.errors import InputRefused
from tsenor_cli.kernels import syrk
from tsenor_cli.pruners.base import InputStats

_COLUMN_BLOCKS = 8  # of the upper triangle: an eighth more than half of the work of the whole product
_SMALL = 256  # inputs below this are not worth cutting


class Accumulator:
    """Sums over the tokens that one input has carried.

    Args:
        features: the size of the input.
        gram: whether the Gram matrix is wanted, or the norms of its columns only.
    """

    def __init__(self, features: int, device: torch.device, *, gram: bool) -> None:
        self.features, self.tokens = features, 0
        self._squares = torch.zeros(features, dtype=torch.float64, device=device)
        self._gram = torch.zeros(features, features, dtype=torch.float64, device=device) if gram else None

    def add(self, x: torch.Tensor, blocks: Container[int] = range(_COLUMN_BLOCKS)) -> None:
        """Add inputs [tokens, features], to some blocks of columns only if others have the rest.

        They are float32, or bfloat16 where syrk takes it.
        """
        self.tokens += len(x)
        if self._gram is None:
            self._squares += x.square().sum(0)
            return
        chosen = [columns for number, columns in enumerate(_column_blocks(x.shape[1])) if number in blocks]
        if x.dtype == torch.float32:
            for first, last in chosen:
                self._gram[:last, first:last] += x[:, :last].T @ x[:, first:last]
        else:
            syrk.add_products(x.contiguous().view(torch.uint16).numpy(), self._gram.numpy(), _joined(chosen))

    def parts(self) -> list[torch.Tensor]:
        """What has been summed up, block by block: views."""
        if self._gram is None:
            return [self._squares]
        return [self._gram[:last, first:last] for first, last in _column_blocks(len(self._gram))]

    def result(self) -> InputStats:
        """The statistics, with the upper triangle of the Gram matrix. Nothing can be added any more."""
        if self._gram is None:
            return InputStats(self.tokens, self._squares)
        return InputStats(self.tokens, self._gram.diagonal().clone(), self._gram)


def _column_blocks(features: int) -> Iterator[tuple[int, int]]:
    """Ranges of columns; each is multiplied with itself and with what stands before it: the upper triangle."""
    width = features if features < _SMALL else -(-features // _COLUMN_BLOCKS)
    return ((first, min(first + width, features)) for first in range(0, features, width))


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours as one, which are less work."""
    found: list[tuple[int, int]] = []
    for first, last in ranges:
        start = found.pop()[0] if found and found[-1][1] == first else first
        found.append((start, last))
    return found


class _AllSeenError(Exception):
    """Not a failure: the rest of the pass would be for nothing."""


class Collector:
    """Statistics of the inputs of some sites of a model while it runs.

    Args:
        model: the model that runs.
        sites: what to watch. A fused site without an expert's number stands for all of its experts.
        gram: whether Gram matrices are wanted, or norms only.
        team: the processes that run the model, each on batches of its own.
        device: where it runs.

    Every process sums up some blocks of columns, of what all of them see, in the order of the batches: the sums are
    those of one process, bit by bit, and so is the work, but for its place.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Iterable[Site],
        *,
        gram: bool,
        team: Team | None = None,
        device: torch.device = CPU,
    ) -> None:
        self._model = model
        self._sites = frozenset(sites)
        self._gram = gram
        self._team = team or Team()
        self._device = device
        self._sums: dict[Site, Accumulator] = {}
        self._rooms: dict[tuple[Hashable, torch.dtype], torch.Tensor] = {}
        self._seen: list[tuple[Site, int, torch.Tensor]] = []  # for the others: site, its call in the last pass, inputs
        self.leaders: dict[Site, Site] = {}  # of several sites that are given the same tensor, the first
        self._given: list[tuple[torch.Tensor, int, Site]] = []  # in one pass: tensor, version, leader
        self._calls: Counter[Site] = Counter()  # of hooked modules, in one pass
        self._can_stop = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch one pass of one batch, and end it early when nothing is left to see.

        That is known from the first pass, which runs to its end: every module is called once.
        """
        with ExitStack() as stack:
            for site in self._sites:
                if not site.fused:
                    module = self._model.get_submodule(site.module)
                    hook = module.register_forward_pre_hook(partial(self._module_given, site), with_kwargs=True)
                    stack.callback(hook.remove)
            fused = {self._model.get_submodule(site.module): site.module for site in self._sites if site.fused}
            if fused:
                from tsenor_cli.checkpoint.adapter.experts import watched_experts

                stack.enter_context(watched_experts(self._model, partial(self._expert_given, fused)))
            with suppress(_AllSeenError):
                yield
        self._can_stop = not fused and set(self._calls) == self._sites and set(self._calls.values()) == {1}
        self._given.clear()  # the next pass brings new tensors
        self._calls.clear()

    def share(self) -> None:
        """Sum up what every process has seen in its last pass, or its lack of one; all of them call it."""
        if self._team.size == 1:
            return
        own = [(site, call, tuple(x.shape), x.dtype) for site, call, x in self._seen]
        everybody = self._team.gather((own, self.leaders))
        for source, (seen, leaders) in enumerate(everybody):
            self.leaders |= leaders
            given = []  # all of a source's, before any is summed up: processes wait for each other but once
            for number, (site, call, shape, dtype) in enumerate(seen):
                blocks = self._blocks_by_rank(site, shape[-1])
                if source == self._team.rank:
                    inputs = self._seen[number][-1]
                else:
                    inputs = self._room(_room_key("given", site, call), shape, dtype, self._device)
                self._team.give(inputs, (shape, dtype), self._device, source, blocks)
                if self._team.rank in blocks:
                    given.append((site, inputs, blocks[self._team.rank]))
            for part in given:
                self._sum(*part)
        self._seen.clear()

    def results(self, owners: Mapping[Site, int] | None = None) -> dict[Site, InputStats]:
        """The statistics of every site that was given any token; sites with the same input have the same object.

        Args:
            owners: in a team, which process is given those of a leader; others have no use for them.
        """
        for site in dict.fromkeys(self.leaders.values()) if self._team.size > 1 else ():
            self._bring_together(site, (owners or {}).get(site, self.home(site)))
        found = {site: sums.result() for site, sums in self._sums.items()}
        return {site: found[leader] for site, leader in self.leaders.items() if leader in found}

    def home(self, site: Site) -> int:
        """The process that sums up most of a site."""
        return (self._ordinals[replace(site, expert=None)] + (site.expert or 0)) % self._team.size

    @cached_property
    def _ordinals(self) -> dict[Site, int]:
        return {site: i for i, site in enumerate(sorted({replace(s, expert=None) for s in self._sites}, key=str))}

    def _blocks_by_rank(self, site: Site, features: int) -> dict[int, list[int]]:
        """Which process sums up which blocks of columns: an expert's are all with one, of which there are many.

        The largest go to and fro over the processes, so that all have about as much.
        """
        count, size, home = len(list(_column_blocks(features))) if self._gram else 1, self._team.size, self.home(site)
        if site.expert is not None:
            return {home: list(range(count))}
        found: dict[int, list[int]] = {}
        for place, block in enumerate(reversed(range(count))):
            round_, step = divmod(place, size)
            found.setdefault((home + (step if round_ % 2 == 0 else size - 1 - step)) % size, []).append(block)
        return found

    def _bring_together(self, site: Site, owner: int) -> None:
        """Move the blocks of a site to the process that prunes with them."""
        rank, own = self._team.rank, self._sums.get(site)
        features, tokens = max(self._team.gather((own.features, own.tokens) if own else (0, 0)))
        if rank == owner:
            own = self._sums.setdefault(site, own or Accumulator(features, self._device, gram=self._gram))
            own.tokens = tokens
        parts = own.parts() if own else []
        shapes = [(last, last - first) for first, last in _column_blocks(features)] if self._gram else [(features,)]
        for source, blocks in sorted(self._blocks_by_rank(site, features).items()):
            for block in blocks if source != owner else ():
                like = shapes[block], torch.float64
                given = self._team.give(parts[block] if rank == source else None, like, self._device, source, [owner])
                if rank == owner and given is not None:
                    parts[block].copy_(given)
        if rank != owner:
            self._sums.pop(site, None)

    def _module_given(self, site: Site, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
        version = inputs._version  # noqa: SLF001  (grows when a tensor is changed in place)
        leader = next((other for seen, then, other in self._given if seen is inputs and then == version), site)
        if self.leaders.setdefault(site, leader) != leader:
            raise InputRefused(
                f"{site.module} shares its input with {leader.module} for some texts and not for others",
                "use --method magnitude, which needs no calibration",
                code="layerwise-unsupported",
            )
        if leader is site:
            self._given.append((inputs, version, site))
            self._add(site, inputs)
        self._calls[site] += 1
        if self._can_stop and len(self._calls) == len(self._sites):
            raise _AllSeenError

    def _expert_given(
        self, names: dict[nn.Module, str], module: nn.Module, parameter: str, expert: int, inputs: torch.Tensor
    ) -> None:
        whole = Site(names.get(module, ""), parameter, fused=True)
        site = whole.of_expert(expert)
        if not self._sites.isdisjoint({whole, site}):
            self.leaders[site] = site
            self._add(site, inputs)

    def _add(self, site: Site, inputs: torch.Tensor) -> None:
        flat = inputs.detach().reshape(-1, inputs.shape[-1])
        if self._team.size == 1:
            self._sum(site, flat)
        else:  # a copy: the layer may write into it before all have it
            call = self._calls[site]
            room = self._room(_room_key("seen", site, call), flat.shape, flat.dtype, flat.device)
            self._seen.append((site, call, room.copy_(flat)))

    def _sum(self, site: Site, inputs: torch.Tensor, blocks: Container[int] = range(_COLUMN_BLOCKS)) -> None:
        if site not in self._sums:
            self._sums[site] = Accumulator(inputs.shape[-1], inputs.device, gram=self._gram)
        if not self._gram or not syrk.takes(inputs):
            inputs = self._room("float32", inputs.shape, torch.float32, inputs.device).copy_(inputs)
        self._sums[site].add(inputs, blocks)

    def _room(self, key: Hashable, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory, the same for a key as last time: new pages take ten times as long as what is written to them."""
        if key is None:
            return torch.empty(shape, dtype=dtype, device=device)
        room = self._rooms.get((key, dtype))
        if room is None or len(room) < prod(shape):
            room = self._rooms[key, dtype] = torch.empty(prod(shape), dtype=dtype, device=device)
        return room[: prod(shape)].view(shape)


def _room_key(purpose: str, site: Site, call: int) -> Hashable:
    """None for experts, of which there are many, with few tokens each: they get new memory."""
    return (purpose, site, call) if site.expert is None else None
