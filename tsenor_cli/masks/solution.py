"""What a mask solve gives back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

Array = TypeVar("Array", torch.Tensor, npt.NDArray[np.generic])


class Status(Enum):
    """How a solve ended: a sentence, and what to do about it."""

    CONVERGED = "converged", "every block met the solver's own criterion", ""
    MAX_ITERATIONS = (
        "max_iterations",
        "some blocks were stopped at the largest number of iterations; their masks are feasible, and the gap is known",
        "give more iterations or a smaller tau, or use the exact solver",
    )
    NONFINITE = "nonfinite", "scores are infinite or not a number", "such weights cannot be ranked"

    def __init__(self, label: str, sentence: str, remedy: str) -> None:
        self.label = label
        self.sentence = sentence
        self.remedy = remedy


@dataclass(frozen=True)
class MaskSolution(Generic[Array]):
    """A feasible mask, what it keeps, and a proof of how much any mask could keep.

    `upper_bound` is the value of a dual solution (docs/mathematics.md): no mask of the pattern keeps more.
    All sums are float64, in the unit of the scores; gaps are relative, so 0 is a proven optimum.
    """

    mask: Array  # bool, the shape, library and device of the scores; True = keep
    objective: float  # Σ of the kept scores
    upper_bound: float  # ≥ objective
    worst_block_gap: float  # the largest gap of any single block
    solver: str  # "exact" or "entropic" (transposable), "top-n" (standard)
    status: Status
    blocks: int  # M×M tiles (transposable) or groups of M (standard)
    repaired: int  # blocks that needed augmenting paths after the dual passes
    iterations: int  # the most that any block took: dual passes (exact), Dykstra iterations (entropic)
    seconds: float  # wall time of the whole solve
    duals: Array | None = None  # float64 [blocks, 2, M], u then v, in the unit of the scores; only if asked for

    @property
    def gap(self) -> float:
        """(upper_bound - objective) / upper_bound; 0 when there is nothing to keep."""
        return (self.upper_bound - self.objective) / self.upper_bound if self.upper_bound > 0 else 0.0


def join_columns(parts: Sequence[MaskSolution[torch.Tensor]], mask: torch.Tensor) -> MaskSolution[torch.Tensor]:
    """One solution for matrices [out, in_k] that stand side by side: sums added, and the worst of the rest.

    `mask` is that of all; those of the parts are not read.

    Raises:
        ValueError: there are no parts.
    """
    if not parts:
        raise ValueError("no solutions to join")
    return replace(
        parts[0],
        mask=mask,
        objective=math.fsum(part.objective for part in parts),
        upper_bound=math.fsum(part.upper_bound for part in parts),
        worst_block_gap=max(part.worst_block_gap for part in parts),
        status=next((part.status for part in parts if part.status is not Status.CONVERGED), Status.CONVERGED),
        blocks=sum(part.blocks for part in parts),
        repaired=sum(part.repaired for part in parts),
        iterations=max(part.iterations for part in parts),
        seconds=math.fsum(part.seconds for part in parts),
        duals=None,
    )
