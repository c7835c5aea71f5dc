"""LoRA adapters of sparse weights: trained and merged without losing the pattern.

An adapter's product B A is dense, so W + B A is, too. A merge leaves out what falls on dropped weights, and says how
much that was; `mask_adapters` has adapters train without it, x (W + M∘B A)ᵀ in place of x Wᵀ + x Aᵀ Bᵀ: a product of
the size of W in every pass, and a merged model that is the trained one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from tsenor_cli.errors import InputRefused, UsageError
from tsenor_cli.training.keeper import keep_masks
from tsenor_cli.training.masks import masked_parameters, model_masks, parameters_of

_AS_IT_IS = "train it as it is, and see what merge_lora says is lost"


def mask_adapters(model: nn.Module, masks: Mapping[str, torch.Tensor] | Path | str) -> list[str]:
    """Let every adapter of a masked weight act through the mask from now on, in place.

    Args:
        model: what `peft.get_peft_model` or `PeftModel.from_pretrained` gave.
        masks: see keep_masks.

    Returns:
        The names of the weights whose adapters are masked now.

    Raises:
        InputRefused: a mask has no parameter, or the adapter of a masked weight is another kind than plain LoRA of a
            linear layer.
    """
    named = masks if isinstance(masks, Mapping) else model_masks(model, masks)
    masked_parameters(model, named)
    found = {name: layer for layer, weights in _adapted(model) for name in weights if name in named}
    if odd := [name for name, layer in found.items() if not isinstance(layer, Linear) or layer.lora_variant]:
        raise InputRefused(
            f"the adapter of {odd[0]} is no plain LoRA of a linear layer",
            _AS_IT_IS,
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
        if kwargs.pop("adapter_names", None) is not None:
            raise UsageError("masked adapters cannot be mixed in a batch", "choose one for all of it with set_adapter")
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            if name in self.lora_A:
                result = result + self._adapter(name, x).to(result.dtype)
        return result

    def _adapter(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What an adapter adds."""
        if name in self.lora_variant:
            raise InputRefused(f"adapter {name} is no plain LoRA", _AS_IT_IS, code="unsupported-model")
        a: Any = self.lora_A[name]
        b: Any = self.lora_B[name]
        scaling, dropout = self.scaling[name], self.lora_dropout[name]
        delta = torch.where(self.kept, b.weight @ a.weight, 0) * scaling
        return linear(dropout(x.to(a.weight.dtype)), delta, None if b.bias is None else b.bias * scaling)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What peft adds to the weight when it merges: no more than what the adapter does."""
        delta: torch.Tensor = super().get_delta_weight(adapter)
        return torch.where(self.kept.t() if self.fan_in_fan_out else self.kept, delta, 0)


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
        InputRefused: see keep_masks; or an adapted weight is tied to another, so that both would change.
        UsageError: the model has no adapters.
        ValueError: peft finds a merged weight that is not finite.
    """
    if not hasattr(model, "unload"):
        raise UsageError("the model has no adapters", "give what peft.get_peft_model made")
    named = masks if isinstance(masks, Mapping) else model_masks(model, masks)
    _refuse_tied(model)
    merged: list[MergedWeight] = []
    with keep_masks(model, named) as keeper:
        for layer, weights in _adapted(model):
            masked = {name: weight for name, weight in weights.items() if name in named}
            before = {name: weight.detach().float().clone() for name, weight in masked.items()}
            layer.merge(safe_merge=True)
            merged += (_merged(name, weight, before[name], named[name]) for name, weight in masked.items())
        keeper.apply()
    plain: nn.Module = model.unload()  # type: ignore[operator]  # a model of peft has it
    _say_what_is_tied(plain)
    return plain, merged


def _refuse_tied(model: nn.Module) -> None:
    uses = Counter(map(id, (weight for _, weight in model.named_parameters(remove_duplicate=False))))
    for layer, weights in _adapted(model):
        for name, weight in weights.items():
            # Rows of embeddings that are trained are of both on purpose: peft sees to that.
            if uses[id(weight)] > 1 and not isinstance(layer, TrainableTokensLayer):
                raise InputRefused(
                    f"{name} has an adapter and is tied to another weight, which merging would change, too",
                    "load the model with tie_word_embeddings=False before it gets adapters",
                    code="unsupported-model",
                )


def _say_what_is_tied(model: nn.Module) -> None:
    """A head that was trained apart is tied no more; were it still so in config.json, a loader could throw it away.

    Where more is tied than a head, config.json has one word for all of it, and so cannot say which is not.
    """
    if not isinstance(model, PreTrainedModel):
        return
    tied: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    if len(tied) == 1 and all(model.get_parameter(one) is not model.get_parameter(two) for one, two in tied.items()):
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _adapted(model: nn.Module) -> Iterator[tuple[Any, dict[str, nn.Parameter]]]:
    """Every adapted layer, and its own weights by name."""
    names = {parameter: name for name, parameter in parameters_of(model)}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            own = layer.get_base_layer().named_parameters()
            adapted = getattr(layer, "parameter_name", None)  # of a layer around one of a module's parameters
            yield layer, {names[weight]: weight for name, weight in own if adapted in (None, name) and weight in names}


def _merged(name: str, weight: torch.Tensor, before: torch.Tensor, mask: torch.Tensor) -> MergedWeight:
    delta, kept = weight.detach().float() - before, mask.to(weight.device)
    total, lost = _energy(delta), _energy(delta[~kept])
    return MergedWeight(name, (total - lost) / max(_energy(before), 1e-30), lost / total if total else 0.0)


def _energy(values: torch.Tensor) -> float:
    return float(values.double().square().sum())
