"""LoRA adapters that train what a merge will keep: their product is masked before it meets an input.

x (W + M∘B A)ᵀ in place of x Wᵀ + x Aᵀ Bᵀ: a product of the size of W in every pass, and a merged model that is the
trained one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.functional import linear

from tsenor_cli.errors import InputRefused
from tsenor_cli.training.masks import model_masks, parameters_of


def mask_adapters(model: nn.Module, masks: Mapping[str, torch.Tensor] | Path | str) -> list[str]:
    """Let every adapter of a masked weight act through the mask from now on, in place.

    Args:
        model: what `peft.get_peft_model` or `PeftModel.from_pretrained` gave.
        masks: see keep_masks.

    Returns:
        The names of the weights whose adapters are masked now.

    Raises:
        InputRefused: the adapter of a masked weight is another kind than plain LoRA of a linear layer.
    """
    named = masks if isinstance(masks, Mapping) else model_masks(model, Path(masks))
    names = {parameter: name for name, parameter in parameters_of(model)}
    found: dict[str, Any] = {}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            owned = (names.get(weight, "") for weight in layer.get_base_layer().parameters())
            found |= {name: layer for name in owned if name in named}
    if odd := [name for name, layer in found.items() if not isinstance(layer, Linear) or layer.lora_variant]:
        raise InputRefused(
            f"the adapter of {odd[0]} is no plain LoRA of a linear layer",
            "train it as it is, and see what merge_lora says is lost",
            code="unsupported-model",
        )
    for name, layer in found.items():
        layer.__class__ = _MaskedLinear
        mask = named[name].t() if layer.fan_in_fan_out else named[name]
        layer.register_buffer("kept", mask.to(layer.get_base_layer().weight.device), persistent=False)
    return list(found)


class _MaskedLinear(Linear):
    """A LoRA layer whose adapters act through `kept`, bool [out, in]; made by `mask_adapters`, never directly."""

    kept: torch.Tensor

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            if name in self.lora_A:
                result = result + self._adapter(name, x).to(result.dtype)
        return result

    def _adapter(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What an adapter adds."""
        a: Any = self.lora_A[name]
        b: Any = self.lora_B[name]
        scaling, dropout = self.scaling[name], self.lora_dropout[name]
        delta = torch.where(self.kept, b.weight @ a.weight, 0) * scaling
        return linear(dropout(x.to(a.weight.dtype)), delta, None if b.bias is None else b.bias * scaling)
