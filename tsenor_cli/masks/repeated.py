"""Masks of scores that come one after the other, as a sweep over the columns of a weight has them."""

from __future__ import annotations

import time
from typing import Protocol

import torch

from tsenor_cli.kernels.contract import Tally
from tsenor_cli.masks import on_cpu
from tsenor_cli.masks.request import Request
from tsenor_cli.masks.solution import MaskSolution
from tsenor_cli.masks.solve import checked


class Repeated(Protocol):
    """A solve that is done again and again.

    Attributes:
        scores: [rows, m], contiguous, ≥ 0: for whoever calls to fill.
        mask: bool [rows, m], contiguous: filled by solve().
    """

    scores: torch.Tensor
    mask: torch.Tensor

    def solve(self) -> None:
        """The mask of these scores.

        Raises:
            UnusableScoresError: some are not finite.
        """
        ...

    def solution(self, mask: torch.Tensor) -> MaskSolution[torch.Tensor]:
        """What has been solved, stripe beside stripe: `mask` is all of theirs, [rows, columns]."""
        ...


class RepeatedOnCPU:
    """Without what a single solve allocates and looks at each time, which takes longer than a few hundred tiles do."""

    def __init__(self, request: Request, rows: int, dtype: torch.dtype) -> None:
        self.scores = torch.empty(rows, request.pattern.m, dtype=dtype)
        self.mask = torch.empty(rows, request.pattern.m, dtype=torch.bool)
        self._request, self._kernel = request, on_cpu.kernel_of(request)
        self._arrays = self.scores.numpy(), self.mask.numpy()
        self._tallies: list[Tally] = []
        self._seconds = 0.0

    def solve(self) -> None:
        """See Repeated."""
        started = time.perf_counter()
        self._tallies.append(self._kernel(*self._arrays, None, None, False))
        self._seconds += time.perf_counter() - started

    def solution(self, mask: torch.Tensor) -> MaskSolution[torch.Tensor]:
        """See Repeated; the mask is checked to be of the pattern."""
        return checked(mask, self._request.pattern, self._tallies, self._request.name, self._seconds)
