"""Prune column by column, each time moving what is lost onto the columns that come after."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

from tsenor_cli.errors import InputRefused
from tsenor_cli.masks.apply import apply_mask
from tsenor_cli.masks.solution import MaskSolution, join_columns
from tsenor_cli.pruners.base import (
    InputStats,
    Needs,
    PrunedLayer,
    SolveMask,
    finished,
    overflow,
    require,
    working_dtype,
)
from tsenor_cli.pruners.error import assess
from tsenor_cli.pruners.factor import Factor, upper_factor
from tsenor_cli.pruners.stripes import open_block


class SparseGPT:
    """score = (w_ij / U_jj)² on the weights as updated so far, a mask for every m columns (algorithm 1 of the paper).

    Args:
        damping: added to the Gram matrix's diagonal, in units of the diagonal's mean.
        block: columns that are updated at a time from all before them: the largest multiple of m up to this, or m.
        update: give the updated weights; otherwise the original ones with the mask that the updates led to.
    """

    citation = (
        "Frantar, Alistarh: SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot. ICML 2023 "
        "(arXiv 2301.00774)"
    )
    needs: ClassVar[Needs] = "gram"

    def __init__(self, damping: float = 0.01, block: int = 128, *, update: bool = True) -> None:
        self.damping = damping
        self.block = block
        self.update = update

    def prune(self, weight: torch.Tensor, solve_mask: SolveMask, stats: InputStats | None = None) -> PrunedLayer:
        """See Pruner.prune. What `solution` sums up are scores in units of the mean squared norm of an input."""
        stats = require(stats, self.needs, weight)
        factor = upper_factor(stats, self.damping, solve_mask.pattern.m, working_dtype(weight))
        pruned, solution = self._prune(weight, factor, solve_mask)
        return PrunedLayer(pruned, solution, assess(weight, solution.mask, pruned, stats, factor.damping))

    def _prune(
        self, weight: torch.Tensor, factor: Factor, solve_mask: SolveMask
    ) -> tuple[torch.Tensor, MaskSolution[torch.Tensor]]:
        values, solution = _sweep(weight, factor, solve_mask, self.block)
        pruned = finished(weight, values, solution.mask) if self.update else apply_mask(weight, solution.mask)
        return pruned, solution


def _sweep(
    weight: torch.Tensor, factor: Factor, solve_mask: SolveMask, block: int
) -> tuple[torch.Tensor, MaskSolution[torch.Tensor]]:
    """The pruned weight [out, in] in its dtype, and what the solutions of its stripes come to.

    Algorithm 1 keeps the errors E of all columns so far, and adds -E U to the right as it goes. With D = E U the change
    of the weight, E is D R, and what a stripe s has to be brought to is w_s + Σ_{p<s} D_p R_ps R_ss⁻¹: here each stripe
    is brought up to date when its turn comes, from the blocks before its own, then from the stripes of its block. Every
    weight is written once. Within the stripe it is algorithm 1 as it stands.
    """
    m, dtype, (out, inputs) = solve_mask.pattern.m, factor.local.dtype, weight.shape
    block = max(m, block // m * m)
    pruned = torch.empty_like(weight, memory_format=torch.contiguous_format)
    mask = torch.empty_like(pruned, dtype=torch.bool)
    change = torch.empty(inputs, out, dtype=dtype, device=weight.device)  # D, transposed; no other copy of the weight
    solutions = []
    for start in range(0, inputs, block):
        here = slice(start, min(start + block, inputs))
        pull, local = factor.pull(start, here.stop), factor.local[start // m : here.stop // m]
        original = change[here].copy_(weight[:, here].T)
        values = torch.addmm(original, pull[:, :start], change[:start])
        part = open_block(original, values, pull[:, start:], local, weight.dtype)
        for first in range(0, here.stop - start, m):
            solution = _solve(solve_mask, part.bring_up_to_date(first), weight.dtype)
            part.finish(first, solution.mask)
            solutions.append(replace(solution, mask=mask))  # thousands of small ones would leave holes in the heap
        last, change[here] = part.results()
        pruned[:, here], mask[:, here] = last.T, part.mask
    return pruned, join_columns(solutions, mask)


def _solve(solve_mask: SolveMask, scores: torch.Tensor, dtype: torch.dtype) -> MaskSolution[torch.Tensor]:
    """The weights were finite at first: scores that are not come from values that have left the dtype."""
    try:
        return solve_mask(scores)
    except InputRefused:
        if bool(torch.isfinite(scores).all()):
            raise
        raise overflow(dtype) from None
