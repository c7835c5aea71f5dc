"""What a mask solve gives back."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MaskSolution:
    """A feasible mask, what it keeps, and a proof of how much any mask could keep.

    `upper_bound` is the value of a dual solution (docs/mathematics.md): no mask of the pattern keeps more.
    All sums are float64, in the unit of the scores; gaps are relative, so 0 is a proven optimum.
    """

    mask: torch.Tensor  # bool, the shape and device of the scores; True = keep
    objective: float  # Σ of the kept scores
    upper_bound: float  # ≥ objective
    worst_block_gap: float  # the largest gap of any single block
    solver: str  # "exact" (transposable) or "top-n" (standard)
    blocks: int  # M×M tiles (transposable) or groups of M (standard)
    repaired: int  # blocks that needed augmenting paths after the dual passes
    seconds: float  # wall time of the whole solve

    @property
    def gap(self) -> float:
        """(upper_bound - objective) / upper_bound; 0 when there is nothing to keep."""
        return (self.upper_bound - self.objective) / self.upper_bound if self.upper_bound > 0 else 0.0
