"""Keep the weights that matter most for the output if each is taken alone."""

from __future__ import annotations

from typing import ClassVar

import torch

from tsenor_cli.masks.apply import apply_mask
from tsenor_cli.pruners.base import Calibrated, InputStats, Needs, PrunedLayer, SolveMask, require, working_dtype

_UNSEEN = 2.0**-20  # of the largest norm: tie terms of a mask decide about what is much smaller


class Wanda:
    """score = |w_ij|·‖x_j‖₂ (equation 1 of the paper), no update."""

    citation = (
        "Sun, Liu, Bair, Kolter: A Simple and Effective Pruning Approach for Large Language Models. ICLR 2024 "
        "(arXiv 2306.11695)"
    )
    needs: ClassVar[Needs] = "norms"

    def prune(self, weight: torch.Tensor, solve_mask: SolveMask, stats: InputStats | None = None) -> PrunedLayer:
        """See Pruner.prune. Inputs that calibration never saw leave nothing to choose by but magnitude.

        Their weights lose against those of any input that it did see, or nearly so.
        """
        stats = require(stats, self.needs, weight)
        scores = weight.to(working_dtype(weight), copy=True)
        scores.mul_(_scale(stats.squared_norms.sqrt()).to(scores.dtype))
        solution = solve_mask(scores, absolute=True)
        del scores  # before the results, which take as much
        return PrunedLayer(apply_mask(weight, solution.mask), solution, Calibrated(stats.tokens))


def _scale(norms: torch.Tensor) -> torch.Tensor:
    """Norms [in] of size 1, whatever the inputs' unit; those that are 0 below the others, and not 0."""
    seen = norms[norms > 0]
    if len(seen) == 0:
        return torch.ones_like(norms)
    scale = norms / seen.max()
    return torch.where(norms > 0, scale, (seen.min() / seen.max()).clamp(max=_UNSEEN))
