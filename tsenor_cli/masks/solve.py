"""Scores in, the best N:M mask out, with its certificate."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch

from tsenor_cli.errors import InputRefused, TsenorError, UsageError
from tsenor_cli.kernels.contract import Kernel, Tally, UnusableScoresError
from tsenor_cli.masks.invariants import violation
from tsenor_cli.masks.solution import MaskSolution
from tsenor_cli.specs import NMPattern

BAND_ELEMENTS = 1 << 24  # scores converted at a time: 64 MiB as float32


class InfeasibleMaskError(AssertionError):
    """A solver returned a mask that is not N:M. Always a bug, never the fault of the input."""


def solve_mask(scores: torch.Tensor, pattern: NMPattern | str, *, transposable: bool = True) -> MaskSolution:
    """Keep n of every m scores so that the kept sum is as large as possible, proven by a dual bound.

    Transposable patterns keep n per row and per column of every m×m tile, by the exact method of docs/mathematics.md;
    the problem is that of TSENOR (arXiv 2505.23949). Standard patterns keep the n largest of every m along a row.
    The same scores give the same mask for any number of threads. Extra memory: the mask and one band of scores.

    Args:
        scores: [.., out, in], any floating dtype, strides and device; finite and ≥ 0. float64 is
            rounded to 24 bits after each block is scaled by a power of two (transposable only).
        pattern: an NMPattern, or text such as "2:4".
        transposable: how to read a text; an NMPattern says it itself.

    Raises:
        UsageError: the pattern is malformed, m does not divide the shape, or a score is negative.
        InputRefused: a score is infinite or not a number. The message names no tensor; the caller knows it.
    """
    started = time.perf_counter()
    if isinstance(pattern, str):
        pattern = NMPattern.parse(pattern, transposable=transposable)
    _check_shape(scores, pattern)
    mask = torch.empty(scores.shape, dtype=torch.bool)
    flat_mask = mask.view(math.prod(mask.shape[:-1]), mask.shape[-1])
    kernel, tallies, row = _kernel(pattern), [], 0
    for band in _bands(scores.detach(), pattern.m):
        target = flat_mask[row : row + len(band)]
        try:
            tallies.append(kernel(band.numpy(), pattern.n, pattern.m, target.numpy()))
        except UnusableScoresError:
            raise _why_unusable(band) from None
        if (problem := violation(target, pattern)) is not None:
            raise InfeasibleMaskError(f"{pattern} {pattern.kind} mask of shape {tuple(scores.shape)}: {problem}")
        row += len(band)
    return _solution(mask.to(scores.device), pattern, tallies, started)


def _check_shape(scores: torch.Tensor, pattern: NMPattern) -> None:
    if not scores.is_floating_point() or scores.ndim < 2:
        raise UsageError(f"scores are {scores.dtype} of shape {tuple(scores.shape)}", "give a floating [.., out, in]")
    if not pattern.divides(*scores.shape[-2:]):
        out_features, in_features = scores.shape[-2:]
        raise UsageError(f"{pattern} {pattern.kind} does not divide a {out_features}x{in_features} matrix")


def _kernel(pattern: NMPattern) -> Kernel:
    """Loading numba takes time that only a solve needs to spend."""
    from tsenor_cli.kernels import cpu, standard

    return cpu.solve_transposable if pattern.transposable else standard.solve_standard


def _bands(scores: torch.Tensor, m: int) -> Iterator[torch.Tensor]:
    """Cut scores [.., out, in] into contiguous CPU bands [rows, in] of whole tile rows, in order.

    A band is a view where it can be: a contiguous float32 tensor is never copied.
    """
    if scores.numel() == 0:
        return
    out_features, in_features = scores.shape[-2:]
    tiles_high = max(1, BAND_ELEMENTS // (m * in_features))
    if scores.is_contiguous():
        matrices = scores.view(1, -1, in_features)
    else:
        matrices = scores.flatten(0, -3) if scores.ndim > 3 else scores.view(-1, out_features, in_features)
    height = matrices.shape[1]
    whole = max(1, BAND_ELEMENTS // (height * in_features))  # small matrices share a band
    for first in range(0, len(matrices), whole):
        for row in range(0, height, rows := min(height, tiles_high * m)):
            yield _on_cpu(matrices[first : first + whole, row : row + rows].reshape(-1, in_features))


def _on_cpu(band: torch.Tensor) -> torch.Tensor:
    band = band.to("cpu", torch.float64 if band.dtype == torch.float64 else torch.float32).contiguous()
    # A tensor mapped from a file may start at any byte; compiled code would be another for it.
    return band if band.data_ptr() % band.element_size() == 0 else band.clone()


def _why_unusable(band: torch.Tensor) -> TsenorError:
    if not bool(torch.isfinite(band).all()):
        return InputRefused("scores are infinite or not a number", "such weights cannot be ranked")
    return UsageError(f"scores are negative (down to {band.min():g})", "give magnitudes")


def _solution(mask: torch.Tensor, pattern: NMPattern, tallies: list[Tally], started: float) -> MaskSolution:
    objective = math.fsum(tally.objective for tally in tallies)
    return MaskSolution(
        mask=mask,
        objective=objective,
        upper_bound=objective + math.fsum(tally.excess for tally in tallies),
        worst_block_gap=max((tally.worst_gap for tally in tallies), default=0.0),
        solver="exact" if pattern.transposable else "top-n",
        blocks=mask.numel() // (pattern.m * pattern.m if pattern.transposable else pattern.m),
        repaired=sum(tally.repaired for tally in tallies),
        seconds=time.perf_counter() - started,
    )
