"""Choose the mask and the weights together, by ADMM, then make the weights the best on the mask."""

from __future__ import annotations

from typing import ClassVar

import torch

from tsenor_cli.masks.apply import apply_mask
from tsenor_cli.masks.solution import MaskSolution
from tsenor_cli.pruners.admm import search_mask
from tsenor_cli.pruners.base import InputStats, Needs, PrunedLayer, SolveMask, finished, require, working_dtype
from tsenor_cli.pruners.error import assess
from tsenor_cli.pruners.factor import correlations
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
        wide = weight.to(working_dtype(weight))
        problem = correlations(stats, self.damping, wide.dtype)
        solution, change = self._solve(wide * problem.scale, problem.matrix, solve_mask)
        if self.update:
            pruned = finished(weight, change.div_(problem.scale).add_(wide), solution.mask)
        else:
            pruned = apply_mask(weight, solution.mask)
        return PrunedLayer(pruned, solution, assess(weight, solution.mask, pruned, stats, problem.damping))

    def _solve(
        self, weight: torch.Tensor, matrix: torch.Tensor, solve_mask: SolveMask
    ) -> tuple[MaskSolution[torch.Tensor], torch.Tensor]:
        """The mask and the change of the weight, in the coordinates of the matrix, as are all arguments."""
        first = solve_mask(weight.square())
        guess = torch.where(first.mask, 0.0, -weight)
        found = search_mask(weight, matrix, first, solve_mask, self.iterations)
        if not self.update:
            alone = torch.where(found.solution.mask, 0.0, -weight)
            return min((first, guess), (found.solution, alone), key=lambda pair: loss_of(pair[1], matrix))
        change, loss = refit(found.change, found.solution.mask, matrix)
        if loss <= loss_of(guess, matrix):
            return found.solution, change
        return first, refit(guess, first.mask, matrix)[0]
