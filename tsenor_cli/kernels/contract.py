"""What every mask kernel takes and gives, whatever it runs on.

    kernel(scores, n, m, mask) -> Tally

`scores [rows, cols]` is a C-contiguous float32 or float64 array, all finite and non-negative, else the kernel raises
UnusableScoresError; m divides cols, and rows too where the mask is transposable. `mask [rows, cols]` is a C-contiguous
bool array that the kernel fills.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Untyped: TypeAlias = Any  # what numba and llvmlite hand out: they publish no types
Scores: TypeAlias = npt.NDArray[np.floating[Any]]
Mask: TypeAlias = npt.NDArray[np.bool_]


class UnusableScoresError(ValueError):
    """A score is negative, infinite or not a number. What to tell the user about it is for the caller to find out."""


class Tally(NamedTuple):
    """The certificate of a solve. Sums are float64 in the unit of the scores."""

    objective: float  # Σ of the kept scores
    excess: float  # upper bound - objective, summed over the blocks; a sum of non-negative terms
    worst_gap: float  # largest excess / (objective + excess) of a block
    repaired: int  # blocks that needed augmenting paths


Kernel: TypeAlias = Callable[[Scores, int, int, Mask], Tally]
