"""What every mask kernel takes and gives, whatever it runs on.

    kernel(scores, n, m, mask) -> Tally

`scores [rows, cols]` is a C-contiguous float32 or float64 array, all finite and non-negative, else the kernel raises
UnusableScoresError; m divides cols, and rows too where the mask is transposable. `mask [rows, cols]` is a C-contiguous
bool array that the kernel fills.

The exact transposable kernel on a CPU also reads 16-bit floats as they are: the bits of bfloat16 as uint16, those of
float16 as int16. It takes and gives duals: float64 [blocks, 2, m], u then v of each block in the unit of its scores,
blocks counted row by row of tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Untyped: TypeAlias = Any  # what numba and llvmlite hand out: they publish no types
Pointer: TypeAlias = Any  # in compiled code: lanes.pointer of an array
Scores: TypeAlias = npt.NDArray[np.floating[Any] | np.integer[Any]]
DualArray: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]


CERTIFY = True  # scripts/bench_masks.py compiles the exact solver without it, to see what the certificate costs


class UnusableScoresError(ValueError):
    """A score is negative, infinite or not a number. What to tell the user about it is for the caller to find out."""


class Tally(NamedTuple):
    """The certificate of a solve. Sums are float64 in the unit of the scores."""

    objective: float  # Σ of the kept scores
    excess: float  # upper bound - objective, summed over the blocks; a sum of non-negative terms
    worst_gap: float  # largest excess / (objective + excess) of a block
    repaired: int  # blocks that needed augmenting paths
    iterations: int = 0  # the most that any block took
    unconverged: int = 0  # blocks that were stopped at the largest number of iterations


def exact_sum(values: Iterable[float]) -> float:
    """Rounded once; infinite where it is more than float64 can hold, for which fsum raises."""
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


Kernel: TypeAlias = Callable[[Scores, int, int, Mask], Tally]
# What a kernel on a GPU gives while it runs: called, it waits for the sums. May raise UnusableScoresError.
Pending: TypeAlias = Callable[[], Tally]
