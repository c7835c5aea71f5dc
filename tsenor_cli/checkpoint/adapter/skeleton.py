"""A model whose decoder layers come and go: everything else is loaded once, one layer at a time beside it.

Tensors go through transformers' own conversion (`convert_and_load_state_dict_in_model`), so a layer in memory is what
`from_pretrained` would have made of it. The functions used are semi-private; this file and its neighbours are the only
ones to change when they move.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from tsenor_cli.checkpoint.adapter.meta import meta_model
from tsenor_cli.checkpoint.reader import Checkpoint
from tsenor_cli.checkpoint.shard import DiskTensor
from tsenor_cli.device import CPU
from tsenor_cli.errors import InputRefused

_REMEDY = "use --method magnitude, which needs no calibration"


class Skeleton:
    """The model of a checkpoint with everything but its decoder layers in memory.

    Args:
        checkpoint: where its weights are.
        device: where they go.

    Attributes:
        model: transformers' model; parameters of layers that are not loaded are on the meta device.
        layers: its decoder layers, in order.
        keys: the name in the model of a tensor on disk, for those that the model has.
        layer_of: the index of the decoder layer that a tensor on disk belongs to, for those that belong to one.

    Raises:
        InputRefused: no list of decoder layers can be recognised, or weights are missing on disk.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device = CPU) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.model: PreTrainedModel = meta_model(checkpoint, device).eval()  # type: ignore[no-untyped-call]
        self.layers_name, self.layers = find_layers(self.model)
        self._mapping = get_model_conversion_mapping(self.model)
        self.keys = keys_in_model(self.model, checkpoint.tensors)
        prefix = f"{self.layers_name}."
        self.layer_of = {
            name: int(key.removeprefix(prefix).partition(".")[0])
            for name, key in self.keys.items()
            if key.startswith(prefix)
        }
        self.load_outside()
        _make_buffers(self.model, device)
        for name, tensor in chain(self.model.named_parameters(), self.model.named_buffers()):
            if tensor.is_meta and not name.startswith(prefix):
                raise InputRefused(
                    f"{name} is not in {checkpoint.directory}",
                    "the checkpoint is incomplete",
                    code="inconsistent-checkpoint",
                )

    def tensors_of(self, index: int) -> list[DiskTensor]:
        """The tensors on disk of one decoder layer."""
        return [self.checkpoint.tensors[name] for name, layer in self.layer_of.items() if layer == index]

    def outside_bytes(self) -> int:
        """Bytes in memory of everything but the decoder layers."""
        prefix = f"{self.layers_name}."
        found = {
            parameter.data_ptr(): parameter.nbytes
            for name, parameter in self.model.named_parameters()
            if not name.startswith(prefix)
        }
        return sum(found.values())

    def load_outside(self, replaced: Mapping[str, torch.Tensor] | None = None) -> None:
        """Bring everything but the decoder layers into memory, `replaced` as for load_layer."""
        outside = [tensor for tensor in self.checkpoint.tensors.values() if tensor.name not in self.layer_of]
        missing = self._load({tensor.name: _OnDisk(tensor) for tensor in outside} | dict(replaced or {}))
        self.model.tie_weights(missing)  # not what is stored twice and differs, whatever config.json says

    def load_layer(self, index: int, replaced: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
        """Bring one decoder layer into memory, some of its tensors `replaced`: name on disk → tensor as on disk."""
        sources: dict[str, Any] = {tensor.name: _OnDisk(tensor) for tensor in self.tensors_of(index)}
        self._load(sources | dict(replaced or {}))
        layer = self.layers[index]
        for name, tensor in chain(layer.named_parameters(), layer.named_buffers()):
            if tensor.is_meta:
                raise InputRefused(
                    f"{self.layers_name}.{index}.{name} is not in {self.checkpoint.directory}",
                    "the checkpoint is incomplete",
                    code="inconsistent-checkpoint",
                )
        return layer

    def drop_layer(self, index: int) -> None:
        """Free the memory of one decoder layer; its buffers stay."""
        for module in self.layers[index].modules():
            _drop(module)

    def drop_outside(self) -> None:
        """Free everything but the decoder layers, for good: only layers can run from now on."""
        inside = set(self.layers.modules())
        for module in self.model.modules():
            if module not in inside:
                _drop(module)

    def _load(self, tensors: Mapping[str, Any]) -> set[str]:
        """Convert tensors and put them into the model, as `from_pretrained` does; returns what the model has beside."""
        dtype = self.model.dtype
        config = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),  # noqa: SLF001  (what from_pretrained calls)
            weight_mapping=self._mapping,  # type: ignore[arg-type]  # what its own function gave
        )
        with no_progress_bar():
            # None: in transformers 5.15 no tensor parallelism, later no offloading to disk.
            info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), config, None)
        self.model.requires_grad_(False)  # what has just been loaded asks for gradients
        problems = [*info.error_msgs, *map(str, info.conversion_errors.values()), *map(str, info.mismatched_keys)]
        if problems:
            raise InputRefused(
                f"transformers cannot load {self.checkpoint.directory} ({problems[0].strip().splitlines()[0]})",
                "the tensors do not fit config.json",
                code="inconsistent-checkpoint",
            )
        return set(info.missing_keys)


def keys_in_model(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The name in the model's state of every tensor on disk that the model takes."""
    state, mapping = model.state_dict(), get_model_conversion_mapping(model)
    renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
    converters = [item for item in mapping if isinstance(item, WeightConverter)]
    keys = {name: rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0] for name in names}
    return {name: key for name, key in keys.items() if key in state}


def _drop(module: nn.Module) -> None:
    """Move the parameters of a module itself to the meta device."""
    for name, parameter in module.named_parameters(recurse=False):
        setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


class _OnDisk:
    """Stands for a tensor until transformers asks for its values, as safetensors' slices do."""

    def __init__(self, tensor: DiskTensor) -> None:
        self._tensor = tensor

    def __getitem__(self, _everything: object) -> torch.Tensor:
        return self._tensor.read()


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers: of all lists that hold nothing but layers, the one with the most parameters.

    Raises:
        InputRefused: there is none, its layers share weights, or the model has an encoder and a decoder.
    """
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputRefused(
            f"{kind} has an encoder and a decoder: it cannot be run layer by layer",
            _REMEDY,
            code="layerwise-unsupported",
        )
    single = set(model._no_split_modules or ())  # noqa: SLF001  (the classes that must stay on one device: layers)
    found = [
        (sum(parameter.numel() for parameter in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(item, GradientCheckpointingLayer) or type(item).__name__ in single for item in module)
    ]
    if not found:
        raise InputRefused(
            f"{kind} has no list of layers that can be recognised", _REMEDY, code="layerwise-unsupported"
        )
    _, name, layers = max(found, key=lambda item: item[0])
    if len(list(layers.parameters())) < sum(len(list(layer.parameters())) for layer in layers):
        raise InputRefused(
            f"the layers of {kind} share weights: they cannot be run one by one",
            _REMEDY,
            code="layerwise-unsupported",
        )
    return name, layers


def _make_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give buffers that are computed, not stored, their values: rotary frequencies, causal masks.

    As `from_pretrained` does it, after loading: parameters that are loaded are marked and left alone, and those of the
    layers are on the meta device, where initialising costs and changes nothing.
    """
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(owner), own_name, torch.empty_like(buffer, device=device))
    model.initialize_weights()  # type: ignore[no-untyped-call]  # of all modules: some fill the buffers of others


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Its bars would be noise: one for each layer, one for each file."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
