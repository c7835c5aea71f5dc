"""Choose the mask and the weights together, by ADMM, then make the weights the best on the mask."""

from __future__ import annotations

from typing import ClassVar

import torch

from tsenor_cli.masks.apply import apply_mask
from tsenor_cli.masks.solution import MaskSolution
from tsenor_cli.pruners.admm import search_mask
from tsenor_cli.pruners.base import (
    InputStats,
    Needs,
    PrunedLayer,
    SolveMask,
    bands,
    finished,
    require,
    working_dtype,
)
from tsenor_cli.pruners.error import assess
from tsenor_cli.pruners.factor import Correlations, correlations
from tsenor_cli.pruners.support import loss_of, refit


class Alps:
    """Weights W and their N:M copy D that are drawn together (algorithm 1 of the paper), then least squares.

    Args:
        damping: added to the Gram matrix's diagonal, in units of the diagonal's mean.
        iterations: of ADMM, at most; it stops when the mask does.
        update: give the refitted weights; otherwise the original ones with the mask.
    """

    citation = (
        "Meng, Behdin, Wang, Mazumder: ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large "
        "Language Models. NeurIPS 2024 (arXiv 2406.07831)"
    )
    needs: ClassVar[Needs] = "gram"

    def __init__(self, damping: float = 0.01, iterations: int = 300, *, update: bool = True) -> None:
        self.damping = damping
        self.iterations = iterations
        self.update = update

    def prune(self, weight: torch.Tensor, solve_mask: SolveMask, stats: InputStats | None = None) -> PrunedLayer:
        """See Pruner.prune. The damped output error is never above that of the mask for W_ij² H_jj alone."""
        stats = require(stats, self.needs, weight)
        problem = correlations(stats, self.damping, working_dtype(weight))
        pruned, solution = self._prune(weight, problem, solve_mask)
        return PrunedLayer(pruned, solution, assess(weight, solution.mask, pruned, stats, problem.damping))

    def _prune(
        self, weight: torch.Tensor, problem: Correlations, solve_mask: SolveMask
    ) -> tuple[torch.Tensor, MaskSolution[torch.Tensor]]:
        wide = weight.to(problem.scale.dtype, copy=True, memory_format=torch.contiguous_format).mul_(problem.scale)
        solution, change = self._solve(wide, problem.matrix, solve_mask)
        if not self.update:
            return apply_mask(weight, solution.mask), solution
        change.div_(problem.scale)
        for rows in bands(len(weight)):
            change[rows] += weight[rows]
        return finished(weight, change, solution.mask), solution

    def _solve(
        self, weight: torch.Tensor, matrix: torch.Tensor, solve_mask: SolveMask
    ) -> tuple[MaskSolution[torch.Tensor], torch.Tensor]:
        """The mask and the change of the weight, in the coordinates of the matrix, as are all arguments."""
        first = solve_mask(weight.square())
        found = search_mask(weight, matrix, first, solve_mask, self.iterations)
        if not self.update:
            choices = (first, found.solution)
            solution = min(choices, key=lambda choice: loss_of(_dropped(weight, choice.mask), matrix))
            return solution, _dropped(weight, solution.mask)
        loss = refit(found.change, found.solution.mask, matrix)
        guess = _dropped(weight, first.mask)
        if loss <= loss_of(guess, matrix):
            return found.solution, found.change
        refit(guess, first.mask, matrix)
        return first, guess


def _dropped(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The change of the weight that the mask alone makes."""
    return apply_mask(weight, ~mask).neg_()
