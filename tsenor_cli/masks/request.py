"""What a solve was asked for, checked before any kernel is loaded, and what it gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tsenor_cli.errors import UsageError
from tsenor_cli.kernels.contract import Tally
from tsenor_cli.specs import SOLVERS, NMPattern

_MOST = 2**31 - 1  # of a count that a kernel takes


@dataclass(frozen=True)
class Request:
    """A pattern and how to find its mask.

    Raises:
        UsageError: there is no such solver, or options do not belong to it.
    """

    pattern: NMPattern
    solver: str  # one of SOLVERS
    absolute: bool  # take |scores|
    tau: float | None = None
    iterations: int | None = None
    local_search: int | None = None
    fallback: bool = False  # plain torch may take over on a GPU that a kernel does not compile for

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise UsageError(f"unknown solver {self.solver!r}", f"known: {', '.join(SOLVERS)}")
        if self.solver == "exact" and (given := [name for name, value in self.entropic.items() if value is not None]):
            raise UsageError(f"{', '.join(given)}: not an option of the exact solver", 'choose "entropic", too')
        if not self.pattern.transposable and self.solver != "exact":
            raise UsageError(f"{self.solver} is for transposable patterns", "a standard pattern needs no other solver")
        self._check_entropic()

    @property
    def entropic(self) -> dict[str, Any]:
        """The options of the entropic solver."""
        return {"tau": self.tau, "iterations": self.iterations, "local_search": self.local_search}

    @property
    def name(self) -> str:
        """Of the solver, as solutions give it."""
        return self.solver if self.pattern.transposable else "top-n"

    @property
    def knows_duals(self) -> bool:
        return self.name == "exact"

    def _check_entropic(self) -> None:
        if too_many := [number for number in (self.iterations, self.local_search) if number and number > _MOST]:
            raise UsageError(f"{too_many[0]} is more than any block can take", "leave it out for as many as are needed")
        if self.tau is not None and not 0 < self.tau < math.inf:
            raise UsageError(
                f"tau is {self.tau:g}", "give a positive number such as 200, or none: it is found for each block"
            )
        if self.iterations is not None and self.iterations < 1:
            raise UsageError(f"{self.iterations} iterations", "give at least one")
        if self.local_search is not None and self.local_search < 0:
            raise UsageError(f"local search of {self.local_search} units", "give 0 or more")


class Solved(NamedTuple):
    """The mask, the certificate of every part of it, and which solver it was."""

    mask: torch.Tensor
    tallies: list[Tally]
    solver: str
    right: torch.Tensor | None = None  # of invariants.count_words, queued behind the kernels
