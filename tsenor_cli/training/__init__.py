"""Training that keeps the masks: for users' own loops, transformers' Trainer, and `tsenor finetune`.

Importing this package is cheap; each public name loads what it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tsenor_cli.training.callback import KeepMasks
    from tsenor_cli.training.keeper import MaskKeeper, keep_masks
    from tsenor_cli.training.lora import MergedWeight, mask_adapters, merge_lora
    from tsenor_cli.training.masks import model_masks
    from tsenor_cli.training.semi_structured import Swap, densify, sparsify_for_training

__all__ = [
    "KeepMasks",
    "MaskKeeper",
    "MergedWeight",
    "Swap",
    "densify",
    "keep_masks",
    "mask_adapters",
    "merge_lora",
    "model_masks",
    "sparsify_for_training",
]

_HOMES = {
    "KeepMasks": "callback",
    "MaskKeeper": "keeper",
    "MergedWeight": "lora",
    "Swap": "semi_structured",
    "densify": "semi_structured",
    "keep_masks": "keeper",
    "mask_adapters": "lora",
    "merge_lora": "lora",
    "model_masks": "masks",
    "sparsify_for_training": "semi_structured",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  (a module's attributes are of any type)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
