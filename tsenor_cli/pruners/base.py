"""What every pruner takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from tsenor_cli.masks.solution import MaskSolution


class SolveMask(Protocol):
    """masks.solve.solve_mask, bound to a pattern and a solver."""

    def __call__(self, scores: torch.Tensor, /, *, absolute: bool = False) -> MaskSolution[torch.Tensor]:
        """Scores [.., out, in] → a solution with a mask of that shape; `absolute` takes |scores|."""
        ...


@dataclass(frozen=True)
class PrunedLayer:
    """The result for one weight.

    The mask is kept apart from the values: a kept weight may be exactly zero.
    """

    weight: torch.Tensor  # [.., out, in], the input's dtype, +0.0 where pruned
    solution: MaskSolution[torch.Tensor]


class Pruner(Protocol):
    """Chooses a mask with `solve_mask` and gives the new weight; never knows which solver or pattern it is."""

    citation: str

    def prune(self, weight: torch.Tensor, solve_mask: SolveMask) -> PrunedLayer:
        """Prune `weight` [.., out, in], a finite floating-point tensor of any strides."""
        ...
