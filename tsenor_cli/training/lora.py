"""Merging LoRA adapters into sparse weights without losing the pattern.

An adapter's product B A is dense, so W + B A is, too. What of it falls on dropped weights is left out, and how much
that was is said: an adapter that has put much there was trained for a model that the merge cannot give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tsenor_cli.training.keeper import keep_masks
from tsenor_cli.training.masks import model_masks, parameters_of


@dataclass(frozen=True)
class MergedWeight:
    """What merging has done to one weight W; ΔW is what the adapters would have added, M its mask."""

    name: str
    change: float  # ‖M∘ΔW‖² / ‖W‖²
    lost: float  # ‖ΔW - M∘ΔW‖² / ‖ΔW‖²; 0 if the adapters add nothing


def merge_lora(
    model: nn.Module, masks: Mapping[str, torch.Tensor] | Path | str
) -> tuple[nn.Module, list[MergedWeight]]:
    """Merge the active adapters of a model of peft, and take them off; the pattern of every masked weight holds.

    Args:
        model: what `peft.get_peft_model` or `PeftModel.from_pretrained` gave.
        masks: see keep_masks.

    Returns:
        The model without adapters, and what happened to each weight that has a mask and an adapter.

    Raises:
        InputRefused: see keep_masks.
        ValueError: peft finds a merged weight that is not finite.
    """
    named = masks if isinstance(masks, Mapping) else model_masks(model, Path(masks))
    names = {parameter: name for name, parameter in parameters_of(model)}
    merged: list[MergedWeight] = []
    with keep_masks(model, named) as keeper:
        for layer in _adapted(model):
            weights = [weight for weight in layer.get_base_layer().parameters() if names.get(weight) in named]
            before = [weight.detach().float().clone() for weight in weights]
            layer.merge(safe_merge=True)
            merged += (
                _merged(names[weight], weight, old, named[names[weight]])
                for weight, old in zip(weights, before, strict=True)
            )
            keeper.apply()
    plain: nn.Module = model.unload()  # type: ignore[operator]  # a model of peft has it
    return plain, merged


def _adapted(model: nn.Module) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))


def _merged(name: str, weight: torch.Tensor, before: torch.Tensor, mask: torch.Tensor) -> MergedWeight:
    delta, kept = weight.detach().float() - before, mask.to(weight.device)
    total, lost = _energy(delta), _energy(delta[~kept])
    return MergedWeight(name, (total - lost) / max(_energy(before), 1e-30), lost / total if total else 0.0)


def _energy(values: torch.Tensor) -> float:
    return float(values.double().square().sum())
