"""Keep the largest absolute weights; change nothing else."""

from __future__ import annotations

import torch

from tsenor_cli.pruners.base import PrunedLayer, SolveMask


class Magnitude:
    """score = |w|, no update, no calibration."""

    citation = (
        "Han, Pool, Tran, Dally: Learning both Weights and Connections for Efficient Neural Networks. NeurIPS 2015"
    )

    def prune(self, weight: torch.Tensor, solve_mask: SolveMask) -> PrunedLayer:
        """See Pruner.prune."""
        solution = solve_mask(weight.abs())
        # where, not a product: w * 0 would leave -0.0, which some sparse kernels cannot read.
        # Adding zero turns a kept -0.0 into +0.0 and changes no other value.
        return PrunedLayer(torch.where(solution.mask, weight, 0.0).add_(0.0), solution)
