"""Prune column by column, each time moving what is lost onto the columns that come after."""

from __future__ import annotations

from typing import ClassVar

import torch

from tsenor_cli.masks.apply import apply_mask
from tsenor_cli.pruners.base import (
    InputStats,
    Needs,
    PrunedLayer,
    SolveMask,
    check_range,
    gram_of,
    require,
    working_dtype,
)
from tsenor_cli.pruners.error import assess
from tsenor_cli.pruners.factor import Factor, upper_factor
from tsenor_cli.pruners.gram import mean_square
from tsenor_cli.pruners.stripes import Block, Sweep, sweep_for

_DISTINCT = 0.1  # a difference that is less than this of its terms is computed anew


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
        swept, values = _sweep(weight, factor, solve_mask, self.block)
        solution = swept.solution()
        if self.update:
            pruned, loss = values.to(weight.dtype), _loss(swept, stats, factor)
            check_range(pruned)
        else:
            pruned, loss = apply_mask(weight, solution.mask), None
        return PrunedLayer(pruned, solution, assess(weight, solution.mask, pruned, stats, factor.damping, loss))


def _sweep(weight: torch.Tensor, factor: Factor, solve_mask: SolveMask, width: int) -> tuple[Sweep, torch.Tensor]:
    """Prune and update: the new weight [out, in] in the dtype of the sweep, and what is to be said of it.

    Algorithm 1 keeps the errors E of all columns so far, and adds -E U to the right as it goes. With D = E U the change
    of the weight, E is D R, and what a stripe s has to be brought to is w_s + Σ_{p<s} D_p R_ps R_ss⁻¹: here each stripe
    is brought up to date when its turn comes, from the blocks before its own, then from the stripes of its block. Every
    weight is written once. Within the stripe it is algorithm 1 as it stands.

    Raises:
        TsenorError: scores have left the range of the dtype.
    """
    m, dtype, (out, inputs) = solve_mask.pattern.m, factor.local.dtype, weight.shape
    width = max(m, width // m * m)
    values = weight.to(dtype, copy=True, memory_format=torch.contiguous_format)
    change = torch.empty(inputs, out, dtype=dtype, device=weight.device)  # D, transposed
    sweep = sweep_for(weight)(values, weight.dtype, solve_mask)
    for start in range(0, inputs, width):
        here = slice(start, min(start + width, inputs))
        pull, local = factor.pull(start, here.stop), factor.local[start // m : here.stop // m]
        sweep.finish(Block(here, pull[:, :start] @ change[:start], change[here], pull[:, start:], local))
    return sweep, values


def _loss(swept: Sweep, stats: InputStats, factor: Factor) -> float | None:
    """‖X(W − W')ᵀ‖² from Σ E², which is that of the damped matrix; None where damping is nearly all of it."""
    loss = swept.lost - factor.damping.relative * swept.moved
    return mean_square(gram_of(stats)) * loss if loss > _DISTINCT * swept.lost else None
