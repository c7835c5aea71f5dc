"""Keep the largest absolute weights; change nothing else."""

from __future__ import annotations

import torch

from tsenor_cli.masks.apply import apply_mask
from tsenor_cli.pruners.base import PrunedLayer, SolveMask


class Magnitude:
    """score = |w|, no update, no calibration."""

    citation = (
        "Han, Pool, Tran, Dally: Learning both Weights and Connections for Efficient Neural Networks. NeurIPS 2015"
    )

    def prune(self, weight: torch.Tensor, solve_mask: SolveMask) -> PrunedLayer:
        """See Pruner.prune."""
        solution = solve_mask(weight, absolute=True)
        return PrunedLayer(apply_mask(weight, solution.mask), solution)
