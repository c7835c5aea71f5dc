"""The columns of a block in SparseGPT's sweep (sparsegpt.py): on a CPU in compiled code, elsewhere in torch."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from tsenor_cli.errors import InputRefused
from tsenor_cli.kernels import stripes
from tsenor_cli.kernels.contract import Tally, UnusableScoresError
from tsenor_cli.masks.solution import MaskSolution, join_columns
from tsenor_cli.masks.solve import checked
from tsenor_cli.pruners.base import SolveMask, overflow


class Block(NamedTuple):
    """Some columns of the weight, and what their updates are made of, in the dtype of the sweep."""

    columns: slice
    updates: torch.Tensor  # [columns, out]: what the changes of the blocks before this one ask for
    change: torch.Tensor  # [columns, out], contiguous: receives what the weight was less what it is
    pull: torch.Tensor  # [columns, columns]: how much of the change of a column (2nd) is to be added to a later one
    local: torch.Tensor  # [columns / m, m, m]: R_ss⁻¹ of every stripe, upper triangular


class Sweep(Protocol):
    """One weight, block by block, from the left.

    Args:
        weight: [out, in], contiguous, in the dtype of the sweep: receives the new one.
        narrow: its own dtype, which values are rounded to.

    Attributes:
        lost: Σ of the squared errors E so far: what the outputs lose by the damped Gram matrix.
        moved: Σ of the squared changes.
    """

    lost: float
    moved: float

    def __init__(self, weight: torch.Tensor, narrow: torch.dtype, solve_mask: SolveMask) -> None: ...

    def finish(self, block: Block) -> None:
        """For each stripe of m columns: bring it up to date, find its mask, give its columns their last values in turn.

        They are rounded then, not at the end, so that later columns make up for the rounding as well.

        Raises:
            TsenorError: a score has left the range of the dtype.
        """
        ...

    def solution(self) -> MaskSolution[torch.Tensor]:
        """Of all stripes together."""
        ...


def sweep_for(weight: torch.Tensor) -> type[Sweep]:
    """How to sweep over a weight where it is."""
    return InCompiledCode if weight.device.type == "cpu" else InTorch


class InTorch:
    """On any device, as one would write it."""

    def __init__(self, weight: torch.Tensor, narrow: torch.dtype, solve_mask: SolveMask) -> None:
        self._weight, self._narrow, self._solve_mask = weight, narrow, solve_mask
        self._solutions: list[MaskSolution[torch.Tensor]] = []
        self.lost = self.moved = 0.0

    def finish(self, block: Block) -> None:
        """See Sweep."""
        m, change = self._solve_mask.pattern.m, block.change.copy_(self._weight[:, block.columns].T)
        values = change + block.updates
        for number, local in enumerate(block.local):
            first, stripe = number * m, slice(number * m, (number + 1) * m)
            columns = values[stripe].addmm_(block.pull[stripe, :first], change[:first])
            keep = self._mask((columns / local.diagonal()[:, None]).square_().T.contiguous()).T.contiguous()
            errors = torch.empty_like(columns)
            for j, (column, kept) in enumerate(zip(columns, keep, strict=True)):
                column.addmv_(errors[:j].T, local[:j, j], alpha=-1)
                last = (column * kept).to(self._narrow).add_(0.0)  # no -0.0
                torch.sub(column, last, out=errors[j]).div_(local[j, j])
                column.copy_(last)
            change[stripe] -= columns
            self.lost += float(errors.square().sum(dtype=torch.float64))
        self.moved += float(change.square().sum(dtype=torch.float64))
        self._weight[:, block.columns] = values.T

    def solution(self) -> MaskSolution[torch.Tensor]:
        """See Sweep."""
        return join_columns(self._solutions, torch.cat([part.mask for part in self._solutions], dim=1))

    def _mask(self, scores: torch.Tensor) -> torch.Tensor:
        """The weights were finite at first: scores that are not come from values that have left the dtype."""
        try:
            self._solutions.append(self._solve_mask(scores))
        except InputRefused:
            if bool(torch.isfinite(scores).all()):
                raise
            raise overflow(self._narrow) from None
        return self._solutions[-1].mask


class InCompiledCode:
    """On a CPU, where calls of torch on a few columns would cost more than what they do."""

    def __init__(self, weight: torch.Tensor, narrow: torch.dtype, solve_mask: SolveMask) -> None:
        self._weight, self._narrow, self._pattern = weight.numpy(), narrow, solve_mask.pattern
        self._rounding = stripes.rounding(torch.finfo(narrow), torch.finfo(weight.dtype))
        self._mask = torch.empty(weight.shape, dtype=torch.bool)
        self._solver = None if solve_mask.keeps_largest else solve_mask.repeated(len(weight), weight.dtype)
        self._tallies: list[Tally] = []  # without a solver
        self.lost = self.moved = 0.0

    def finish(self, block: Block) -> None:
        """See Sweep."""
        arrays = (part.contiguous().numpy() for part in (block.updates, block.pull, block.local))
        work = stripes.open_block(self._weight, block.columns.start, *arrays)
        try:
            self._finish(work)
        except UnusableScoresError:
            raise overflow(self._narrow) from None
        written = self._weight, block.change.numpy(), self._mask.numpy()
        lost, moved = stripes.close_block(work, block.columns.start, *written)
        self.lost, self.moved = self.lost + lost, self.moved + moved

    def _finish(self, work: stripes.Block) -> None:
        n, m, rows = self._pattern.n, self._pattern.m, len(self._weight)
        if self._solver is None:  # all stripes at once: rows have nothing to do with one another
            self._tallies.append(Tally(stripes.finish_all(work, n, m, rows, self._rounding), 0.0, 0.0, 0))
            return
        scores, mask = self._solver.scores.numpy(), self._solver.mask.numpy()
        for first in range(0, work.values.shape[1], m):
            stripes.bring_up_to_date(work, first, scores)
            self._solver.solve()
            stripes.finish(work, first, mask, self._rounding)

    def solution(self) -> MaskSolution[torch.Tensor]:
        """See Sweep."""
        if self._solver is None:
            return checked(self._mask, self._pattern, self._tallies, "top-n")
        return self._solver.solution(self._mask)
