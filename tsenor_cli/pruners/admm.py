"""ADMM for a weight and its N:M copy: algorithm 1 of ALPS (arXiv 2406.07831), with the schedule of its authors.

Constants and rules are those of github.com/mazumder-lab/ALPS, alps.py, which does more than the paper says.
docs/decisions/0010 lists where we differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from tsenor_cli.masks.solution import MaskSolution
from tsenor_cli.pruners.base import SolveMask, bands, multiply

_CHECK_EVERY = 3  # iterations
_SETTLED_AFTER = 30  # iterations, if no larger share of the mask changes than this:
_SETTLED = 3e-4


class Found(NamedTuple):
    """Where the search has ended."""

    solution: MaskSolution[torch.Tensor]
    change: torch.Tensor  # [out, in]: the N:M weights less the original ones, in the coordinates of the matrix
    iterations: int


def search_mask(
    weight: torch.Tensor, matrix: torch.Tensor, first: MaskSolution[torch.Tensor], solve_mask: SolveMask, limit: int
) -> Found:
    """Minimise tr((B − W) H (B − W)ᵀ) with B = D, D being N:M: B by least squares, D by a mask for (B + V/ρ)², in turn.

    D and V/ρ have no entry in common: with Z = B + V/ρ, D is Z on the mask and the next V/ρ is Z off it. And
    B − W = (D − V/ρ − W) ρ (H + ρI)⁻¹, which is small where B is near W, so that float32 is enough for it.

    Args:
        weight: W [out, in], in the coordinates of the matrix.
        matrix: H [in, in] with ones on the diagonal, positive definite, of the dtype of `weight`.
        first: the solution for W².
        solve_mask: finds the masks.
        limit: the most iterations.
    """
    penalty, kept = _Penalty(), max(1, int(first.mask.count_nonzero()))
    shrinkage = _Shrinkage(matrix)
    shrink = shrinkage.at(penalty.rho)
    copy, dual = multiply(weight, first.mask, out=torch.empty_like(weight)), torch.zeros_like(weight)
    change, seen, iteration = torch.zeros_like(weight), first.mask, 0
    for iteration in range(1, limit + 1):
        torch.mm(copy.sub_(dual).sub_(weight), shrink, out=change)
        total = dual.add_(weight).add_(change)
        mask = solve_mask(torch.mul(total, total, out=copy)).mask  # the scores, where there was no use for the copy
        multiply(total, mask, out=copy)
        dual = total.sub_(copy)
        if iteration % _CHECK_EVERY:
            continue
        moved = int((mask ^ seen).count_nonzero()) / kept
        seen = mask
        if (moved == 0 and penalty.raised) or (moved < _SETTLED and iteration > _SETTLED_AFTER):
            break
        before = penalty.rho
        if penalty.adapt(moved):
            multiply(weight, first.mask, out=copy)
            dual.zero_()
        dual.mul_(before / penalty.rho)  # V itself stays
        shrink = shrinkage.at(penalty.rho)
    solution = solve_mask(torch.add(weight, change, out=copy).square_())
    return Found(solution, torch.where(solution.mask, change, torch.neg(weight, out=copy)), iteration)


@dataclass
class _Penalty:
    """ρ: as small as lets the mask move at all, then larger and larger, the more the mask still moves."""

    rho: float = 0.1
    raised: bool = False
    largest: float = 1e6
    least: float = 1e-4  # ours: below it H + ρI may be singular in float32, and B no longer feels D

    def adapt(self, moved: float) -> bool:
        """The next ρ, after a share `moved` of the mask has changed. True: ρ was too large, start again from W."""
        if not self.raised and moved <= 0.005:
            self.rho = max(self.rho / 5, self.least)
            return moved > 0
        self.raised = True
        self.rho = min(self.rho * (1.3 if moved > 0.1 else 1.2 if moved > 0.005 else 1.1), self.largest)
        return False


class _Shrinkage:
    """ρ (H + ρI)⁻¹ for one ρ at a time, in the storage of a single float64 matrix."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self._matrix = matrix
        self._work = torch.empty_like(matrix, dtype=torch.float64)

    def at(self, rho: float) -> torch.Tensor:
        """[in, in], of the dtype of H; good until the next call."""
        work, failed_at = self._work.copy_(self._matrix), torch.empty((), dtype=torch.int32, device=self._work.device)
        work.diagonal().add_(rho)
        torch.linalg.cholesky_ex(work.mT, out=(work.mT, failed_at))  # of rows that LAPACK takes for columns
        assert int(failed_at) == 0, "H is positive definite"
        torch.cholesky_inverse(work.mT, out=work.mT)
        return _packed(work.mul_(rho), self._matrix.dtype)


def _packed(work: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 `work` [n, n] as `dtype`, in the front part of its own storage, which what is read is always ahead of."""
    packed = work.view(-1).view(dtype)[: work.numel()].view_as(work)
    for rows in bands(len(work)):
        packed[rows] = work[rows].to(dtype, copy=True)
    return packed
