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

_PART = 16  # columns of a block that are brought up to date at a time, from those before them in the block


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
        values, solutions = _sweep(weight, factor, solve_mask, self.block)
        solution = join_columns(solutions)
        pruned = finished(weight, values, solution.mask) if self.update else apply_mask(weight, solution.mask)
        return pruned, solution


def _sweep(
    weight: torch.Tensor, factor: Factor, solve_mask: SolveMask, block: int
) -> tuple[torch.Tensor, list[MaskSolution[torch.Tensor]]]:
    """The pruned weight [out, in] in its dtype, and the solution of every stripe.

    Algorithm 1 keeps the errors E of all columns so far, and adds -E U to the right as it goes. With D = E U the change
    of the weight, E is D R, and what a stripe s has to be brought to is w_s + Σ_{p<s} D_p R_ps R_ss⁻¹: here each stripe
    is brought up to date when its turn comes, from the whole blocks before it, then from the parts of its block, then
    from the stripes of its part: thin products are slow. Every weight is written once. Within the stripe it is
    algorithm 1 as it stands.
    """
    m, dtype, (out, inputs) = solve_mask.pattern.m, factor.local.dtype, weight.shape
    block, part = (max(m, size // m * m) for size in (block, _PART))
    pruned = torch.empty_like(weight, memory_format=torch.contiguous_format)
    mask = torch.empty_like(pruned, dtype=torch.bool)  # one, or thousands of small ones would leave holes in the heap
    change = torch.empty(inputs, out, dtype=dtype)  # D, transposed; the only other copy of the weight
    solutions = []
    for start in range(0, inputs, block):
        end = min(start + block, inputs)
        pull, current = factor.pull(start, end), change[start:end].copy_(weight[:, start:end].T).clone()
        current.addmm_(pull[:, :start], change[:start])
        for first in range(start, end, m):
            begin = start + (first - start) // part * part
            if first == begin:
                rows = slice(begin - start, min(begin + part, end) - start)
                current[rows].addmm_(pull[rows, start:begin], change[start:begin])
            stripe, local = slice(first - start, first - start + m), factor.local[first // m]
            values = current[stripe].addmm_(pull[stripe, begin:first], change[begin:first])
            scores = (values / local.diagonal()[:, None]).square_()
            solution = _solve(solve_mask, scores.T.contiguous(), weight.dtype)
            _finish_stripe(values, solution.mask.T.contiguous(), local, weight.dtype)
            change[first : first + m] -= values
            kept = mask[:, first : first + m].copy_(solution.mask)
            solutions.append(replace(solution, mask=kept))
        pruned[:, start:end] = current.T  # rounded already
    return pruned, solutions


def _solve(solve_mask: SolveMask, scores: torch.Tensor, dtype: torch.dtype) -> MaskSolution[torch.Tensor]:
    """The weights were finite at first: scores that are not come from values that have left the dtype."""
    try:
        return solve_mask(scores)
    except InputRefused:
        if bool(torch.isfinite(scores).all()):
            raise
        raise overflow(dtype) from None


def _finish_stripe(values: torch.Tensor, keep: torch.Tensor, local: torch.Tensor, dtype: torch.dtype) -> None:
    """Give the columns of a stripe their last values, one after the other.

    They are rounded here, not at the end, so that later columns make up for the rounding as well.

    Args:
        values: [m, out], changed in place.
        keep: bool [m, out].
        local: U [m, m] of the stripe, upper triangular.
        dtype: what to round to.
    """
    errors, diagonal = torch.empty_like(values), local.diagonal().tolist()
    for j, (column, kept) in enumerate(zip(values, keep, strict=True)):
        if j:
            column.addmv_(errors[:j].T, local[:j, j], alpha=-1)
        rounded = (column * kept).to(dtype)
        torch.sub(column, rounded, out=errors[j]).div_(diagonal[j])
        column.copy_(rounded)
