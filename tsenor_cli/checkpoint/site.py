"""Where in a running model the input of a weight can be seen."""

from __future__ import annotations

from dataclasses import dataclass

NOT_IN_MODEL = "not in the model"  # the reason to keep tensors that transformers does not load


@dataclass(frozen=True)
class Site:
    """The input of a linear module, or of one parameter of fused experts."""

    module: str  # its name in the model
    parameter: str = "weight"
    expert: int | None = None  # which expert a tensor on disk is; None: all of them, or no expert at all
    fused: bool = False  # the module holds the weights of many experts

    def of_expert(self, expert: int) -> Site:
        """The site of one of the experts."""
        return Site(self.module, self.parameter, expert, fused=True)
