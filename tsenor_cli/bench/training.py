"""What 2:4 weights gain in training: a Linear forward and backward, dense, sparse forward only, sparse both ways."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import linear

from tsenor_cli.errors import CheckFailed
from tsenor_cli.masks.solve import solve_mask
from tsenor_cli.training import packing
from tsenor_cli.training.packing import Kernels, Packed
from tsenor_cli.training.semi_structured import pack_weight, two_of_four_linear

LLAMA_8B_LAYER = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}  # [out, in]: how many
WARM_UP = 3  # rounds that are not counted
TOLERANCE = 2  # units in the last place of the largest entry: both sides round once, and sum in another order


@dataclass(frozen=True)
class Milliseconds:
    """Of one step of a layer: medians over the rounds."""

    packing: float  # once per step, however many micro-batches it has; with the check of the pattern
    forward: float
    backward: float
    step: float  # all three
    speed_up: float  # of a step: the median over rounds of dense / this


@dataclass(frozen=True)
class ShapeTimes:
    """One shape [out, in]; what is None has no kernels, for `reason`."""

    shape: tuple[int, int]
    count: int  # how many matrices have it
    dense: Milliseconds
    forward_only: Milliseconds | None
    both_ways: Milliseconds | None
    worst_error: float | None  # of y, dx and dW of the sparse ways, in parts of the largest entry
    reason: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def total_ms(times: Sequence[ShapeTimes]) -> dict[str, float]:
    """A step of all matrices, each way; a shape without kernels is dense in all of them."""
    return {
        way: sum(one.count * (getattr(one, way) or one.dense).step for one in times)
        for way in ("dense", "forward_only", "both_ways")
    }


@dataclass(frozen=True)
class _Way:
    """One way to run a layer, and its weight [out, in]."""

    name: str
    weight: torch.Tensor
    pack: Callable[[torch.Tensor], Packed] | None = None

    def prepare(self) -> Packed | None:
        return None if self.pack is None else self.pack(self.weight)

    def run(self, x: torch.Tensor, packed: Packed | None) -> torch.Tensor:
        return linear(x, self.weight) if packed is None else two_of_four_linear(x, self.weight, None, packed)


def time_shape(
    shape: tuple[int, int], count: int, *, tokens: int, dtype: torch.dtype, device: torch.device, repeat: int, seed: int
) -> ShapeTimes:
    """Hold the sparse products against dense ones, then time a step each way, in turn, `repeat` times.

    Raises:
        CheckFailed: a sparse product is wrong; nothing has been timed.
    """
    generator = torch.Generator().manual_seed(seed)
    kernels = packing.find_kernels(device)
    reason = kernels if isinstance(kernels, str) else _misfit(kernels, shape, dtype)
    original = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    ways = [_Way("dense", original.to(device, dtype).requires_grad_())]
    if reason is None:
        assert isinstance(kernels, Kernels)
        row_wise, transposable = (_pruned(original, transposable=kind).to(device, dtype) for kind in (False, True))
        ways += [
            _Way("sparse forward only", row_wise.requires_grad_(), lambda w: kernels.pack_rows(w.detach())),
            _Way("sparse both ways", transposable.requires_grad_(), lambda w: pack_weight(w, dtype)),
        ]
    x, dy = (torch.randn(tokens, size, generator=generator).to(device, dtype) for size in reversed(shape))
    x.requires_grad_()
    errors = [_confirm(way, x, dy) for way in ways[1:]]
    times = _time(ways, x, dy, repeat)
    forward_only, both_ways = times[1:] or (None, None)
    return ShapeTimes(shape, count, times[0], forward_only, both_ways, max(errors, default=None), reason)


def _misfit(kernels: Kernels, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    if dtype not in kernels.dtypes:
        return f"{kernels.name} has no kernels for {dtype}"
    if any(size % kernels.multiple for size in shape):
        return f"{kernels.name} wants multiples of {kernels.multiple}"
    return None


def _pruned(weight: torch.Tensor, *, transposable: bool) -> torch.Tensor:
    return torch.where(solve_mask(weight, "2:4", absolute=True, transposable=transposable).mask, weight, 0)


def _confirm(way: _Way, x: torch.Tensor, dy: torch.Tensor) -> float:
    """The worst error of y, dx and dW against dense float32 products of the same weight."""
    y = way.run(x, way.prepare())
    ours = (y.detach(), *torch.autograd.grad(y, (x, way.weight), dy))
    wide_x, wide_weight = (one.detach().float().requires_grad_() for one in (x, way.weight))
    y = linear(wide_x, wide_weight)
    theirs = (y.detach(), *torch.autograd.grad(y, (wide_x, wide_weight), dy.float()))
    worst, allowed = 0.0, TOLERANCE * torch.finfo(x.dtype).eps
    for what, a, b in zip(("y", "dx", "dW"), ours, theirs, strict=True):
        error = ((a - b).abs().max() / b.abs().max()).item()
        if not error <= allowed:
            raise CheckFailed(
                f"{list(way.weight.shape)}, {way.name}: {what} is off by {error:.1e} of its largest entry, more than "
                f"{allowed:.1e}; nothing was timed",
                "please report this",
            )
        worst = max(worst, error)
    return worst


def _time(ways: list[_Way], x: torch.Tensor, dy: torch.Tensor, repeat: int) -> list[Milliseconds]:
    """Every way once a round, so that what disturbs a round hits all of them."""
    rounds = [[_step(way, x, dy) for way in ways] for _ in range(WARM_UP + repeat)][WARM_UP:]
    dense = [sum(steps[0]) for steps in rounds]
    found = []
    for laps in zip(*rounds, strict=True):
        packing_ms, forward, backward = map(statistics.median, zip(*laps, strict=True))
        steps = [sum(lap) for lap in laps]
        speed_up = statistics.median(a / b for a, b in zip(dense, steps, strict=True))
        found.append(Milliseconds(packing_ms, forward, backward, statistics.median(steps), speed_up))
    return found


def _step(way: _Way, x: torch.Tensor, dy: torch.Tensor) -> list[float]:
    """Milliseconds of packing, forward and backward."""
    now, between = _clock(x.device)
    marks = [now()]
    packed = way.prepare()
    marks.append(now())
    y = way.run(x, packed)
    marks.append(now())
    torch.autograd.grad(y, (x, way.weight), dy)
    marks.append(now())
    return between(marks)


def _clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[list[Any]], list[float]]]:
    """What marks a moment, and what gives the milliseconds between moments: on a GPU its own."""
    if device.type != "cuda":
        return time.perf_counter, lambda marks: [1e3 * (b - a) for a, b in pairwise(marks)]

    def now() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    def between(marks: list[torch.cuda.Event]) -> list[float]:
        torch.cuda.synchronize(device)
        return [a.elapsed_time(b) for a, b in pairwise(marks)]

    return now, between
