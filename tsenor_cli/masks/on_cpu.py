"""The mask engine on a CPU: scores cut into bands, each solved by a compiled kernel as it lies in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch

from tsenor_cli.kernels.contract import DualArray, Mask, Scores, Tally
from tsenor_cli.masks.bands import cut
from tsenor_cli.masks.request import Request, Solved

BAND_ELEMENTS = 1 << 24  # scores copied at a time, where they have to be
# What the kernels read as it is (kernels/contract.py); other types become float32 first.
_READ_AS = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
}
Kernel: TypeAlias = Callable[[Scores, Mask, DualArray | None, DualArray | None, bool], Tally]


def solve_bands(
    scores: torch.Tensor, request: Request, warm: torch.Tensor | None, duals: torch.Tensor | None
) -> Solved:
    """The mask of scores [.., out, in], on the CPU, and the certificate of every band; `duals` is filled if given."""
    kernel, m = kernel_of(request), request.pattern.m
    mask = torch.from_numpy(np.empty(scores.shape, np.bool_))  # NumPy asks for huge pages: a fifth of torch's time
    flat = mask.view(math.prod(mask.shape[:-1]), mask.shape[-1])
    tallies, row = [], 0
    for band in cut(scores, m, BAND_ELEMENTS):
        target = flat[row : row + len(band)]
        first, last = (end * mask.shape[-1] // m**2 for end in (row, row + len(band)))
        start, found = (None if array is None else array[first:last].numpy() for array in (warm, duals))
        tallies.append(kernel(_as_read(band.cpu()).numpy(), target.numpy(), start, found, request.absolute))
        row += len(band)
    return Solved(mask, tallies, request.name)


def kernel_of(request: Request) -> Kernel:
    """Loading numba takes time that only a solve needs to spend."""
    n, m = request.pattern.n, request.pattern.m
    if not request.pattern.transposable:
        from tsenor_cli.kernels import standard

        return lambda x, mask, _w, _d, sign: standard.solve_standard(x, n, m, mask, absolute=sign)
    if request.solver == "entropic":
        from tsenor_cli.kernels import entropic

        options = request.entropic
        return lambda x, mask, _w, _d, sign: entropic.solve_entropic(x, n, m, mask, absolute=sign, **options)
    from tsenor_cli.kernels import exact

    return lambda x, mask, warm, duals, sign: exact.solve_transposable(x, n, m, mask, warm, duals, absolute=sign)


def _as_read(band: torch.Tensor) -> torch.Tensor:
    band = band if band.dtype in _READ_AS else band.to(torch.float32)
    # A tensor mapped from a file may start at any byte; compiled code would be another for it.
    band = band if band.data_ptr() % band.element_size() == 0 else band.clone()
    return band.view(_READ_AS[band.dtype])
