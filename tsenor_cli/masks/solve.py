"""Scores in, an N:M mask out, with its certificate."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from tsenor_cli.device import CPU, find_device
from tsenor_cli.errors import InputRefused, TsenorError, UsageError
from tsenor_cli.kernels.contract import Tally, UnusableScoresError, exact_sum
from tsenor_cli.masks import on_cpu, on_gpu
from tsenor_cli.masks.invariants import violation
from tsenor_cli.masks.request import Request, Solved
from tsenor_cli.masks.solution import Array, MaskSolution, Status
from tsenor_cli.specs import NMPattern

_PACKED = {getattr(torch, "float4_e2m1fn_x2", None)}  # several numbers in one entry


class InfeasibleMaskError(AssertionError):
    """A solver returned a mask that is not N:M. Always a bug, never the fault of the input."""


def solve_mask(
    scores: Array,
    pattern: NMPattern | str,
    *,
    transposable: bool = True,
    solver: str = "exact",
    device: str | torch.device | None = None,
    absolute: bool = False,
    warm_start: MaskSolution[Any] | Array | None = None,
    return_duals: bool = False,
    tau: float | None = None,
    iterations: int | None = None,
    local_search: int | None = None,
    fallback: bool = False,
) -> MaskSolution[Array]:
    """Keep n of every m scores so that the kept sum is as large as possible, and say how large it could be.

    Transposable patterns keep n per row and per column of every m×m tile; the problem is that of TSENOR (arXiv
    2505.23949). Standard patterns keep the n largest of every m along a row. The same scores give the same mask for any
    number of threads, strides, batch and floating type, and an exact one from any warm start (docs/decisions/0003).
    Extra memory: the mask, and 64 MiB of scores if they are not contiguous or not of a type that is read as it is.

    Args:
        scores: torch tensor or NumPy array [.., out, in], any floating type, strides and device; finite, and ≥ 0 unless
            `absolute`. Scores of a tile are told apart down to 2^-31 of the largest (docs/decisions/0003).
        pattern: an NMPattern, or text such as "2:4".
        transposable: how to read a text; an NMPattern says it itself.
        solver: "exact" is optimal (docs/mathematics.md); "entropic" is the pipeline of the TSENOR paper, which is not.
            Standard patterns know one solver only, and it is exact.
        device: where to compute: auto (a GPU if there is one), cpu, cuda, cuda:i, or None, which is where scores are if
            that is a CUDA GPU, and else the CPU.
        absolute: take |scores|, as for the magnitudes of a weight, without a copy.
        warm_start: duals [blocks, 2, m] of similar scores, or a solution that has them. Speed only: any finite numbers
            lead to the same mask. Exact transposable only.
        return_duals: fill `duals` of the solution. Exact transposable only.
        tau: entropic only: the last τ times the largest score of a block; found for each block if None.
        iterations: entropic only: the most Dykstra iterations of a block, 300 if None.
        local_search: entropic only: how many units of a block are placed by gain, all if None.
        fallback: let plain torch solve it (masks/plain.py, not optimal) on a GPU that a kernel does not compile for.

    Raises:
        UsageError: the pattern is malformed, m does not divide the shape, a score is negative, duals are of another
            shape, or an option belongs to another solver.
        InputRefused: a score is infinite or not a number, or there is no such device. The message names no tensor; the
            caller knows it.
        TsenorError: a GPU has too little memory, or a kernel does not compile for it.
    """
    started = time.perf_counter()
    if isinstance(pattern, str):
        pattern = NMPattern.parse(pattern, transposable=transposable)
    if not isinstance(pattern, NMPattern):
        raise UsageError(f"{pattern!r} is no pattern", 'give an NMPattern, or text such as "2:4"')
    request = Request(pattern, solver, absolute, tau, iterations, local_search, fallback)
    tensor = _tensor(scores).detach()
    here = tensor.device if tensor.device.type == "cuda" else CPU
    place = here if device is None else find_device(str(device))
    _check_shape(tensor, pattern)
    if not request.knows_duals and (warm_start is not None or return_duals):
        raise UsageError(f"{request.name} takes and gives no duals", "use the exact solver and a transposable pattern")
    shape = (_blocks(tensor, pattern), 2, pattern.m)
    warm = None if warm_start is None else _warm(warm_start, shape, place)
    duals = torch.empty(shape, dtype=torch.float64, device=place) if return_duals else None
    mask, tallies, name, right = _solve(tensor, request, warm, duals, place)
    found: MaskSolution[Any] = checked(mask, pattern, tallies, name, right=right)
    return replace(
        found,
        mask=_like(mask, scores),
        seconds=time.perf_counter() - started,
        duals=None if duals is None else _like(duals, scores),
    )


def checked(
    mask: torch.Tensor,
    pattern: NMPattern,
    tallies: Sequence[Tally],
    solver: str,
    seconds: float = 0.0,
    right: torch.Tensor | None = None,
) -> MaskSolution[torch.Tensor]:
    """What the kernels' tallies say of a mask, once it is seen to be of the pattern; for `right` see violation().

    Raises:
        InfeasibleMaskError: it is not.
        InputRefused: the sums are too large.
    """
    if (problem := violation(mask, pattern, right)) is not None:
        raise InfeasibleMaskError(f"{pattern} {pattern.kind} mask of shape {tuple(mask.shape)}: {problem}")
    objective = exact_sum(tally.objective for tally in tallies)
    upper_bound = objective + exact_sum(tally.excess for tally in tallies)
    if not math.isfinite(upper_bound):
        raise InputRefused("the scores add up to more than float64 can hold", "divide them", code="nonfinite-weights")
    stopped = any(tally.unconverged for tally in tallies)
    return MaskSolution(
        mask=mask,
        objective=objective,
        upper_bound=upper_bound,
        worst_block_gap=max((tally.worst_gap for tally in tallies), default=0.0),
        solver=solver,
        status=Status.MAX_ITERATIONS if stopped else Status.CONVERGED,
        blocks=_blocks(mask, pattern),
        repaired=sum(tally.repaired for tally in tallies),
        iterations=max((tally.iterations for tally in tallies), default=0),
        seconds=seconds,
    )


def _blocks(scores: torch.Tensor, pattern: NMPattern) -> int:
    return scores.numel() // (pattern.m * (pattern.m if pattern.transposable else 1))


def _solve(
    scores: torch.Tensor,
    request: Request,
    warm: torch.Tensor | None,
    duals: torch.Tensor | None,
    place: torch.device,
) -> Solved:
    def solve(request: Request) -> Solved:
        if place.type == "cpu":
            return on_cpu.solve_bands(scores, request, warm, duals)
        return on_gpu.solve_bands(scores, request, warm, duals, place)

    try:
        return solve(request)
    except UnusableScoresError:
        if (error := _why_unusable(scores, request.absolute)) is not None:
            raise error from None
        return solve(replace(request, absolute=True))  # -0.0 is not negative


def _tensor(scores: Array) -> torch.Tensor:
    """NumPy's strides, byte order and write protection may all be ones that torch does not take."""
    if isinstance(scores, torch.Tensor):
        if scores.is_meta or scores.is_nested or scores.layout != torch.strided:
            raise UsageError(f"scores are {scores.layout} on {scores.device}", "give a dense tensor with its values")
        return scores.resolve_neg()
    native = np.asarray(scores)
    native = native.astype(native.dtype.newbyteorder("="), copy=False)
    if any(stride < 0 or stride % native.itemsize for stride in native.strides) or not native.flags.writeable:
        native = native.copy()
    try:
        return torch.from_numpy(native)
    except TypeError:
        raise UsageError(f"scores are {native.dtype}", "give a floating [.., out, in]") from None


def _like(result: torch.Tensor, scores: Array) -> Array:
    """In the library of the scores, and on their device."""
    if isinstance(scores, torch.Tensor):
        return result.to(scores.device)
    return cast("Array", result.cpu().numpy())


def _warm(given: MaskSolution[Any] | Array, shape: tuple[int, int, int], place: torch.device) -> torch.Tensor:
    found = given.duals if isinstance(given, MaskSolution) else given
    if found is None:
        raise UsageError("the warm start has no duals", "solve it with return_duals=True")
    duals = _tensor(found).detach().to(place, torch.float64).contiguous()
    if duals.shape != shape or not _all_finite(duals):
        raise UsageError(f"warm_start of shape {tuple(duals.shape)}", f"give finite duals of shape {shape}")
    return duals


def _all_finite(duals: torch.Tensor) -> bool:
    """A sum is finite only if all are, and quickly taken; not by torch, whose threads go on spinning after it."""
    if duals.device.type == "cpu":
        with np.errstate(over="ignore", invalid="ignore"):
            return math.isfinite(duals.numpy().sum()) or bool(torch.isfinite(duals).all())
    return bool(torch.isfinite(duals).all())


def _check_shape(scores: torch.Tensor, pattern: NMPattern) -> None:
    if not scores.is_floating_point() or scores.dtype in _PACKED or scores.ndim < 2:
        raise UsageError(f"scores are {scores.dtype} of shape {tuple(scores.shape)}", "give a floating [.., out, in]")
    if not pattern.divides(*scores.shape[-2:]):
        out_features, in_features = scores.shape[-2:]
        raise UsageError(
            f"{pattern} {pattern.kind} does not divide a {out_features}x{in_features} matrix", code="bad-pattern"
        )


def _why_unusable(scores: torch.Tensor, absolute: bool) -> TsenorError | None:
    wide = scores.float() if scores.element_size() == 1 else scores
    if not bool(torch.isfinite(wide).all()):
        return InputRefused(Status.NONFINITE.sentence, Status.NONFINITE.remedy, code="nonfinite-weights")
    if not absolute and bool((wide < 0).any()):
        return UsageError(f"scores are negative (down to {wide.min().double():g})", "give magnitudes, or absolute=True")
    return None
