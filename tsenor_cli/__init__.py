"""tsenor: provably optimal N:M sparse checkpoints, transposable by default.

Importing this package is cheap; each public name loads what it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tsenor_cli.masks.solution import MaskSolution, Status
    from tsenor_cli.masks.solve import solve_mask
    from tsenor_cli.masks.torch_prune import TransposableNM
    from tsenor_cli.pipeline import finetune, plan_prune, prune, verify
    from tsenor_cli.specs import FinetuneSpec, NMPattern, PruneSpec

__version__ = "0.1.0"

__all__ = [
    "FinetuneSpec",
    "MaskSolution",
    "NMPattern",
    "PruneSpec",
    "Status",
    "TransposableNM",
    "finetune",
    "plan_prune",
    "prune",
    "solve_mask",
    "verify",
]

_HOMES = {
    "FinetuneSpec": "specs",
    "MaskSolution": "masks.solution",
    "NMPattern": "specs",
    "PruneSpec": "specs",
    "Status": "masks.solution",
    "TransposableNM": "masks.torch_prune",
    "finetune": "pipeline",
    "plan_prune": "pipeline",
    "prune": "pipeline",
    "solve_mask": "masks.solve",
    "verify": "pipeline",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  (a module's attributes are of any type)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
