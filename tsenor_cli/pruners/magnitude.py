"""Keep the largest absolute weights; change nothing else."""

from __future__ import annotations

from typing import ClassVar

import torch

from tsenor_cli.masks.apply import apply_mask
from tsenor_cli.pruners.base import InputStats, Needs, PrunedLayer, SolveMask


class Magnitude:
    """score = |w|, no update, no calibration."""

    citation = (
        "Han, Pool, Tran, Dally: Learning both Weights and Connections for Efficient Neural Networks. NeurIPS 2015"
    )
    needs: ClassVar[Needs] = "nothing"

    def prune(self, weight: torch.Tensor, solve_mask: SolveMask, stats: InputStats | None = None) -> PrunedLayer:  # noqa: ARG002
        """See Pruner.prune. No statistics are needed, and none are looked at."""
        solution = solve_mask(weight, absolute=True)
        return PrunedLayer(apply_mask(weight, solution.mask), solution)
