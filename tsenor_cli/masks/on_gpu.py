"""The mask engine on a GPU: bands as large as its free memory allows, halved when that was too much."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from traceback import walk_tb
from types import FrameType
from typing import TypeAlias

import torch

from tsenor_cli.errors import TsenorError, UsageError
from tsenor_cli.kernels.contract import Pending, UnusableScoresError
from tsenor_cli.masks.bands import cut
from tsenor_cli.masks.invariants import count_words
from tsenor_cli.masks.plain import NAME, solve_plain
from tsenor_cli.masks.request import Request, Solved
from tsenor_cli.specs import NMPattern

BYTES_PER_SCORE = 24  # of a band: the scores and a copy in the kernel's layout, float64 both, and masks
MOST_ELEMENTS = 1 << 28  # more at a time is no faster
SURELY_FREE = 16  # what needs less than this part of the memory is tried at once: to ask takes longer than to solve
_READ = {torch.float64, torch.float32, torch.bfloat16, torch.float16}  # other types become float32 first
Kernel: TypeAlias = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, bool], Pending
]  # scores, mask, warm duals, found duals, absolute


def solve_bands(
    scores: torch.Tensor,
    request: Request,
    warm: torch.Tensor | None,
    duals: torch.Tensor | None,
    device: torch.device,
) -> Solved:
    """The mask of scores [.., out, in], on `device`, and the certificate of every band; `duals` is filled if given.

    Raises:
        KernelFailed: a kernel does not compile on this GPU.
        TsenorError: its memory is too small for the smallest band.
    """
    # Triton launches on the current device, whatever device its tensors are on.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        try:
            return _solve(scores, _kernel(request), request, warm, duals, device)
        except KernelFailed:
            if not request.fallback:
                raise
        if duals is not None:
            raise UsageError("plain torch gives no duals", "leave out return_duals, or fallback")
        kernel = partial(_plain_kernel, request.pattern)
        return _solve(scores, kernel, request, None, None, device)._replace(solver=NAME)


def _plain_kernel(
    pattern: NMPattern, scores: torch.Tensor, mask: torch.Tensor, _warm: None, _duals: None, absolute: bool
) -> Pending:
    tally = solve_plain(scores, pattern, mask, absolute=absolute)
    return lambda: tally


def _solve(
    scores: torch.Tensor,
    kernel: Kernel,
    request: Request,
    warm: torch.Tensor | None,
    duals: torch.Tensor | None,
    device: torch.device,
) -> Solved:
    """In bands of a size that fits."""
    free = _free_bytes(device, scores.numel() * BYTES_PER_SCORE)
    elements = max(1, min(MOST_ELEMENTS, free // BYTES_PER_SCORE))
    while True:
        try:
            mask, pending = _solve_in_bands(scores, kernel, request, warm, duals, device, elements)
            # Queued before anything is waited for, so that the card goes on to it when the kernels end.
            right = count_words(mask.flatten(end_dim=-2), request.pattern) if pending else None
            return Solved(mask, [tally() for tally in pending], request.name, right)
        except torch.OutOfMemoryError:
            if elements <= scores.shape[-1] * request.pattern.m:
                raise TsenorError(
                    f"{device} has too little free memory for {request.pattern.m} rows of {scores.shape[-1]} scores",
                    "free some of it, or use --device cpu",
                    code="out-of-memory",
                ) from None
        elements = min(elements, scores.numel()) // 2
        torch.cuda.empty_cache()


def _solve_in_bands(
    scores: torch.Tensor,
    kernel: Kernel,
    request: Request,
    warm: torch.Tensor | None,
    duals: torch.Tensor | None,
    device: torch.device,
    elements: int,
) -> tuple[torch.Tensor, list[Pending]]:
    m = request.pattern.m
    mask = torch.empty(scores.shape, dtype=torch.bool, device=device)
    flat = mask.view(math.prod(mask.shape[:-1]), mask.shape[-1])
    pending, row = [], 0
    for piece in cut(scores, m, elements):
        band = piece.to(device, non_blocking=True)
        band = band if band.dtype in _READ else band.to(torch.float32)
        first, last = (end * mask.shape[-1] // m**2 for end in (row, row + len(band)))
        start, found = (None if array is None else array[first:last] for array in (warm, duals))
        with _plain_failures(device):
            pending.append(kernel(band, flat[row : row + len(band)], start, found, request.absolute))
        row += len(band)
    return mask, pending


def _kernel(request: Request) -> Kernel:
    """Triton is there where torch has a GPU, and nowhere else does it have to be."""
    n, m = request.pattern.n, request.pattern.m
    if not request.pattern.transposable:
        from tsenor_cli.kernels.gpu import standard

        return lambda x, mask, _w, _d, sign: standard.solve_standard(x, n, m, mask, absolute=sign)
    if request.solver == "entropic":
        from tsenor_cli.kernels.gpu import entropic

        options = request.entropic
        return lambda x, mask, _w, _d, sign: entropic.solve_entropic(x, n, m, mask, absolute=sign, **options)
    from tsenor_cli.kernels.gpu import exact

    return lambda x, mask, warm, duals, sign: exact.solve_transposable(
        x, n, m, mask, warm=warm, duals=duals, absolute=sign
    )


class KernelFailed(TsenorError):
    """A kernel does not compile, or not run, on this GPU."""

    code = "kernel-failed"


@contextmanager
def _plain_failures(device: torch.device) -> Iterator[None]:
    """What goes wrong inside Triton, as one line."""
    try:
        yield
    except (TsenorError, UnusableScoresError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not any(_module(frame).startswith("triton") for frame, _ in walk_tb(error.__traceback__)):
            raise
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise KernelFailed(
            f"the kernel does not compile for {device} with triton {version('triton')}: {why}",
            "use --device cpu, or allow plain torch on the GPU with --fallback; and please report this",
        ) from error


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _free_bytes(device: torch.device, wanted: int) -> int:
    """What nobody holds, and what torch holds and does not use; or what is `wanted`, if that is little."""
    if wanted <= torch.cuda.get_device_properties(device).total_memory // SURELY_FREE:
        return wanted
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held
