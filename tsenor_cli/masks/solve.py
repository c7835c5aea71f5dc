"""Scores in, an N:M mask out, with its certificate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from tsenor_cli.errors import InputRefused, TsenorError, UsageError
from tsenor_cli.kernels.contract import DualArray, Mask, Scores, Tally, UnusableScoresError
from tsenor_cli.masks.invariants import violation
from tsenor_cli.masks.solution import Array, MaskSolution, Status
from tsenor_cli.specs import SOLVERS, NMPattern

BAND_ELEMENTS = 1 << 24  # scores copied at a time, where they have to be
# What the kernels read as it is (kernels/contract.py); other types become float32 first.
_READ_AS = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
}


class InfeasibleMaskError(AssertionError):
    """A solver returned a mask that is not N:M. Always a bug, never the fault of the input."""


def solve_mask(
    scores: Array,
    pattern: NMPattern | str,
    *,
    transposable: bool = True,
    solver: str = "exact",
    device: str | None = None,
    absolute: bool = False,
    warm_start: MaskSolution[Any] | Array | None = None,
    return_duals: bool = False,
    tau: float | None = None,
    iterations: int | None = None,
    local_search: int | None = None,
) -> MaskSolution[Array]:
    """Keep n of every m scores so that the kept sum is as large as possible, and say how large it could be.

    Transposable patterns keep n per row and per column of every m×m tile; the problem is that of TSENOR (arXiv
    2505.23949). Standard patterns keep the n largest of every m along a row. The same scores give the same mask for any
    number of threads, strides, batch and floating type, and an exact one from any warm start (docs/decisions/0003).
    Extra memory: the mask, and 64 MiB of scores if they are not contiguous or not of a type that is read as it is.

    Args:
        scores: torch tensor or NumPy array [.., out, in], any floating type, strides and device; finite, and ≥ 0 unless
            `absolute`. A score counts to 2^-55 of the largest one in its tile.
        pattern: an NMPattern, or text such as "2:4".
        transposable: how to read a text; an NMPattern says it itself.
        solver: "exact" is optimal (docs/mathematics.md); "entropic" is the pipeline of the TSENOR paper, which is not.
            Standard patterns know one solver only, and it is exact.
        device: None, "auto" or "cpu": where to compute.
        absolute: take |scores|, as for the magnitudes of a weight, without a copy.
        warm_start: duals [blocks, 2, m] of similar scores, or a solution that has them. Speed only: any finite numbers
            lead to the same mask. Exact transposable only.
        return_duals: fill `duals` of the solution. Exact transposable only.
        tau: entropic only: the last τ times the largest score of a block; found for each block if None.
        iterations: entropic only: the most Dykstra iterations of a block, 300 if None.
        local_search: entropic only: how many units of a block are placed by gain, all if None.

    Raises:
        UsageError: the pattern is malformed, m does not divide the shape, a score is negative, duals are of another
            shape, or an option belongs to another solver.
        InputRefused: a score is infinite or not a number, or there is no such device. The message names no tensor; the
            caller knows it.
    """
    started = time.perf_counter()
    if isinstance(pattern, str):
        pattern = NMPattern.parse(pattern, transposable=transposable)
    if device not in {None, "auto", "cpu"}:
        raise InputRefused(f"device {device}: this version has no mask engine for it", "use --device cpu")
    tensor = _tensor(scores).detach()
    _check_shape(tensor, pattern)
    engine = _engine(pattern, solver, {"tau": tau, "iterations": iterations, "local_search": local_search})
    if not engine.knows_duals and (warm_start is not None or return_duals):
        raise UsageError(f"{engine.name} takes and gives no duals", "use the exact solver and a transposable pattern")
    blocks = tensor.numel() // (pattern.m * (pattern.m if pattern.transposable else 1))
    warm = None if warm_start is None else _warm(warm_start, (blocks, 2, pattern.m))
    duals = torch.empty(blocks, 2, pattern.m, dtype=torch.float64) if return_duals else None
    mask, tallies = _solve_bands(tensor, pattern, engine, absolute, warm, duals)
    objective = math.fsum(tally.objective for tally in tallies)
    stopped = any(tally.unconverged for tally in tallies)
    return MaskSolution(
        mask=_like(mask, scores),
        objective=objective,
        upper_bound=objective + math.fsum(tally.excess for tally in tallies),
        worst_block_gap=max((tally.worst_gap for tally in tallies), default=0.0),
        solver=engine.name,
        status=Status.MAX_ITERATIONS if stopped else Status.CONVERGED,
        blocks=blocks,
        repaired=sum(tally.repaired for tally in tallies),
        iterations=max((tally.iterations for tally in tallies), default=0),
        seconds=time.perf_counter() - started,
        duals=None if duals is None else _like(duals, scores),
    )


class _Engine(NamedTuple):
    """A kernel bound to its pattern and options: solve(scores, mask, warm, duals, absolute)."""

    name: str
    solve: Callable[[Scores, Mask, DualArray | None, DualArray | None, bool], Tally]
    knows_duals: bool = False


def _engine(pattern: NMPattern, solver: str, options: dict[str, Any]) -> _Engine:
    """Choose the kernel. Loading numba takes time that only a solve needs to spend."""
    n, m = pattern.n, pattern.m
    if solver not in SOLVERS:
        raise UsageError(f"unknown solver {solver!r}", f"known: {', '.join(SOLVERS)}")
    if solver == "exact" and (given := [name for name, value in options.items() if value is not None]):
        raise UsageError(f"{', '.join(given)}: not an option of the exact solver", 'give solver="entropic" as well')
    if not pattern.transposable:
        if solver != "exact":
            raise UsageError(f"{solver} is for transposable patterns", "a standard pattern needs no other solver")
        from tsenor_cli.kernels import standard

        return _Engine("top-n", lambda x, mask, _w, _d, sign: standard.solve_standard(x, n, m, mask, absolute=sign))
    if solver == "entropic":
        _check_entropic(**options)
        from tsenor_cli.kernels import entropic

        return _Engine(
            "entropic",
            lambda x, mask, _w, _d, sign: entropic.solve_entropic(x, n, m, mask, absolute=sign, **options),
        )
    from tsenor_cli.kernels import exact

    return _Engine(
        "exact",
        lambda x, mask, warm, duals, sign: exact.solve_transposable(x, n, m, mask, warm, duals, absolute=sign),
        knows_duals=True,
    )


def _check_entropic(tau: float | None, iterations: int | None, local_search: int | None) -> None:
    if tau is not None and not 0 < tau < math.inf:
        raise UsageError(f"tau is {tau:g}", "give a positive number such as 200, or none: it is found for each block")
    if iterations is not None and iterations < 1:
        raise UsageError(f"{iterations} iterations", "give at least one")
    if local_search is not None and local_search < 0:
        raise UsageError(f"local search of {local_search} units", "give 0 or more")


def _solve_bands(
    scores: torch.Tensor,
    pattern: NMPattern,
    engine: _Engine,
    absolute: bool,
    warm: torch.Tensor | None,
    duals: torch.Tensor | None,
) -> tuple[torch.Tensor, list[Tally]]:
    mask = torch.from_numpy(np.empty(scores.shape, np.bool_))  # NumPy asks for huge pages: a fifth of torch's time
    flat = mask.view(math.prod(mask.shape[:-1]), mask.shape[-1])
    tallies, row = [], 0
    for band in _bands(scores, pattern.m):
        target = flat[row : row + len(band)]
        first, last = (end * mask.shape[-1] // pattern.m**2 for end in (row, row + len(band)))
        start, found = (None if array is None else array[first:last].numpy() for array in (warm, duals))
        try:
            tallies.append(engine.solve(band.numpy(), target.numpy(), start, found, absolute))
        except UnusableScoresError:
            if (error := _why_unusable(scores, absolute)) is not None:
                raise error from None
            tallies.append(engine.solve(band.numpy(), target.numpy(), start, found, True))  # -0.0 is not negative
        if (problem := violation(target, pattern)) is not None:
            raise InfeasibleMaskError(f"{pattern} {pattern.kind} mask of shape {tuple(scores.shape)}: {problem}")
        row += len(band)
    return mask, tallies


def _tensor(scores: Array) -> torch.Tensor:
    """NumPy's strides, byte order and write protection may all be ones that torch does not take."""
    if isinstance(scores, torch.Tensor):
        return scores
    native = np.asarray(scores)
    native = native.astype(native.dtype.newbyteorder("="), copy=False)
    if min(native.strides, default=0) < 0 or not native.flags.writeable:
        native = native.copy()
    try:
        return torch.from_numpy(native)
    except TypeError:
        raise UsageError(f"scores are {native.dtype}", "give a floating [.., out, in]") from None


def _like(result: torch.Tensor, scores: Array) -> Array:
    """In the library of the scores, and on their device."""
    if isinstance(scores, torch.Tensor):
        return result.to(scores.device)
    return cast("Array", result.numpy())


def _warm(given: MaskSolution[Any] | Array, shape: tuple[int, int, int]) -> torch.Tensor:
    found = given.duals if isinstance(given, MaskSolution) else given
    if found is None:
        raise UsageError("the warm start has no duals", "solve it with return_duals=True")
    duals = _tensor(found).detach().to("cpu", torch.float64).contiguous()
    if duals.shape != shape or not _all_finite(duals):
        raise UsageError(f"warm_start of shape {tuple(duals.shape)}", f"give finite duals of shape {shape}")
    return duals


def _all_finite(duals: torch.Tensor) -> bool:
    """A sum is finite only if all are, and quickly taken; not by torch, whose threads go on spinning after it."""
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(duals.numpy().sum()) or bool(torch.isfinite(duals).all())


def _check_shape(scores: torch.Tensor, pattern: NMPattern) -> None:
    if not scores.is_floating_point() or scores.ndim < 2:
        raise UsageError(f"scores are {scores.dtype} of shape {tuple(scores.shape)}", "give a floating [.., out, in]")
    if not pattern.divides(*scores.shape[-2:]):
        out_features, in_features = scores.shape[-2:]
        raise UsageError(f"{pattern} {pattern.kind} does not divide a {out_features}x{in_features} matrix")


def _bands(scores: torch.Tensor, m: int) -> Iterator[torch.Tensor]:
    """Cut scores [.., out, in] into contiguous CPU bands [rows, in] of whole tile rows, in order, as kernels read them.

    A band is a view where it can be: a contiguous tensor of a type that the kernels read is never copied.
    """
    if scores.numel() == 0:
        return
    out_features, in_features = scores.shape[-2:]
    # The batch axes are flattened, which copies only where strides allow no view.
    matrices = scores.reshape(-1, out_features, in_features)
    if matrices.is_contiguous():
        matrices = matrices.view(
            1, -1, in_features
        )  # the tiles of a batch of contiguous matrices lie like those of one
    _, height, _ = matrices.shape
    tiles_high = max(1, BAND_ELEMENTS // (m * in_features))
    whole = max(1, BAND_ELEMENTS // (height * in_features))  # small matrices share a band
    for first in range(0, len(matrices), whole):
        for row in range(0, height, rows := min(height, tiles_high * m)):
            band = matrices[first : first + whole, row : row + rows].reshape(-1, in_features)
            yield _as_read(band.cpu())


def _as_read(band: torch.Tensor) -> torch.Tensor:
    band = band.contiguous() if band.dtype in _READ_AS else band.to(torch.float32).contiguous()
    # A tensor mapped from a file may start at any byte; compiled code would be another for it.
    band = band if band.data_ptr() % band.element_size() == 0 else band.clone()
    return band.view(_READ_AS[band.dtype])


def _why_unusable(scores: torch.Tensor, absolute: bool) -> TsenorError | None:
    wide = scores.float() if scores.element_size() == 1 else scores
    if not bool(torch.isfinite(wide).all()):
        return InputRefused(Status.NONFINITE.sentence, Status.NONFINITE.remedy)
    if not absolute and bool((wide < 0).any()):
        return UsageError(f"scores are negative (down to {wide.min().double():g})", "give magnitudes, or absolute=True")
    return None
