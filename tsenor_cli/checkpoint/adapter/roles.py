"""What each tensor on disk is to transformers.

The model is built on the meta device (no memory), transformers' own conversion mapping turns each name on disk
into a parameter, and the module that owns the parameter says what it is. Remote code is never run.
The functions used here are semi-private (`rename_source_key`, `get_model_conversion_mapping`); they are the ones
`from_pretrained` itself uses, so names cannot disagree with what will be loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from tsenor_cli.checkpoint.adapter.meta import meta_model
from tsenor_cli.checkpoint.adapter.skeleton import find_layers
from tsenor_cli.checkpoint.layouts import Layout
from tsenor_cli.checkpoint.reader import Checkpoint
from tsenor_cli.checkpoint.shard import DiskTensor
from tsenor_cli.checkpoint.site import NOT_IN_MODEL, Site
from tsenor_cli.errors import InputRefused

# Conversions that leave each matrix as it is, or only join and cut it along the output axis.
_ROW_KEEPING = {"MergeModulelist", "Concatenate", "Chunk", "Split", "SplitModulelist"}
# Conversions that change the order of the output rows: N:M along the input axis survives, tiles do not.
_ROW_MOVING = {"Interleave", "PermuteForRope", "VisionFuseAndPermuteForRope", "VisionUnfuseAndPermuteForRope"}
_ROUTER_NAME = re.compile(r"(^|\.)(gate|router\w*|shared_expert_gate)(\.|$)")


@dataclass(frozen=True)
class Role:
    """What one tensor on disk is: a weight whose `layout` is known, or left alone for `reason`.

    `prunable` is set for every weight of a linear map in the body of the model, also where its layout is not
    understood: such a weight is skipped, but counts against the coverage.
    `out_pieces` are the sizes into which loading cuts the output axis; a tile must not straddle them.
    """

    reason: str | None = None
    layout: Layout | None = None
    prunable: bool = True
    out_pieces: tuple[int, ...] = ()
    rows_move: bool = False  # loading permutes the output rows
    site: Site | None = None  # where its input can be seen, if it can
    layer: int | None = None  # the decoder layer it belongs to, if it belongs to one


def read_roles(checkpoint: Checkpoint, *, layered: bool = False) -> dict[str, Role]:
    """The role of every tensor of the checkpoint.

    Raises:
        InputRefused: transformers has no model for this config, or one in which a weight to prune has another shape;
            or, if it must be `layered`, one without a list of decoder layers.
    """
    model = meta_model(checkpoint)
    mapping = get_model_conversion_mapping(model)
    try:
        layers, _ = find_layers(model)
    except InputRefused:
        if layered:
            raise
        layers = None
    return _Roles(model, mapping, layers).of(checkpoint.tensors.values())


class _Roles:
    """Looks tensors up in one meta model."""

    def __init__(self, model: PreTrainedModel, mapping: list[Any], layers: str | None) -> None:
        self.model = model
        self.layer = re.compile(rf"{re.escape(layers)}\.(\d+)\.") if layers is not None else None
        self.state = model.state_dict()
        self.renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
        self.converters = [item for item in mapping if isinstance(item, WeightConverter)]
        self.body = getattr(model, model.base_model_prefix, model)
        outputs = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.heads = {id(outputs)} if outputs is not None else set()

    def of(self, tensors: Iterable[DiskTensor]) -> dict[str, Role]:
        return {tensor.name: self._role(tensor) for tensor in tensors}

    def _role(self, tensor: DiskTensor) -> Role:
        key, pattern = rename_source_key(
            tensor.name, self.renamings, self.converters, self.model.base_model_prefix, self.state
        )
        if key not in self.state:
            return Role(NOT_IN_MODEL, prunable=False)
        owner_name, _, parameter = key.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        within = self.layer.match(key) if self.layer else None
        layer = int(within[1]) if within else None
        reason = self._left_alone(owner, owner_name, tensor)
        if reason is not None:
            return Role(reason, prunable=False, layer=layer)
        converter = next((item for item in self.converters if pattern in item.source_patterns), None)
        if converter is None or pattern is None:
            loaded = tuple(self.state[key].shape)
            role = self._plain_role(owner, parameter, tensor.shape)
            if role.layout is not None and tensor.shape != loaded:
                raise InputRefused(
                    f"{tensor.name} has shape {list(tensor.shape)}, and config.json makes it {list(loaded)}",
                    "fetch both again, from one place",
                    code="inconsistent-checkpoint",
                )
        else:
            role = self._converted_role(owner, parameter, tensor, key, converter)
        site = self._site(owner, owner_name, parameter)
        if site is not None and site.fused and len(tensor.shape) == 2:  # one file entry for each expert
            site = _expert_site(site, tensor.name, pattern)
        return replace(role, site=site, layer=layer)

    def _site(self, owner: nn.Module, name: str, parameter: str) -> Site | None:
        """Where the input of a parameter can be seen: modules have hooks, experts transformers' interface."""
        if isinstance(owner, (nn.Linear, Conv1D)) and parameter == "weight":
            return Site(name)
        if hasattr(owner, "has_gate") and hasattr(owner, "is_transposed"):  # set by use_experts_implementation
            return Site(name, parameter, fused=True)
        return None

    def _left_alone(self, owner: nn.Module, name: str, tensor: DiskTensor) -> str | None:
        """Why a tensor must not be pruned whatever the pattern, or None."""
        if len(tensor.shape) < 2:
            return "not a matrix"
        if isinstance(owner, nn.Embedding):
            return "embedding"
        if id(owner) in self.heads or not self._in_body(name):
            return "head"
        if "Router" in type(owner).__name__ or (_ROUTER_NAME.search(name) and not _is_square(tensor.shape)):
            return "router"
        return None

    def _in_body(self, name: str) -> bool:
        if self.body is self.model:
            return True
        prefix = self.model.base_model_prefix
        return name == prefix or name.startswith(prefix + ".")

    def _plain_role(self, owner: nn.Module, parameter: str, shape: tuple[int, ...]) -> Role:
        """The role of a tensor that is loaded as it stands on disk."""
        if parameter == "weight" and len(shape) == 2 and isinstance(owner, (nn.Linear, Conv1D)):
            layout: Layout = "out_in" if isinstance(owner, nn.Linear) else "in_out"
            return Role(layout=layout, out_pieces=(shape[0 if layout == "out_in" else 1],))
        if parameter == "weight" and isinstance(owner, nn.Conv2d):
            return (
                Role(layout="conv2d", out_pieces=(shape[0],))
                if owner.groups == 1
                else Role("grouped convolution", prunable=False)
            )
        if "bias" not in parameter and _is_experts(owner):
            return _fused_experts_role(owner, parameter, shape)
        return Role("not a linear layer", prunable=False)

    def _converted_role(
        self, owner: nn.Module, parameter: str, tensor: DiskTensor, key: str, converter: WeightConverter
    ) -> Role:
        """The role of a tensor that loading stacks, joins, cuts or turns before it becomes a parameter."""
        loaded = tuple(self.state[key].shape)
        in_memory = self._plain_role(owner, parameter, loaded)
        if in_memory.layout is None:
            return in_memory
        operations = [type(operation).__name__ for operation in converter.operations]
        turned = self._turned(operations, converter, tensor, key)
        known = set(operations) <= _ROW_KEEPING | _ROW_MOVING | {"Transpose"} and _moves_rows_only(converter, tensor)
        if not known or turned is None or in_memory.layout == "conv2d":
            return Role(f"loaded through {'+'.join(operations)}, which is not supported")
        input_last = in_memory.layout.endswith("out_in") != turned
        layout: Layout = "out_in" if input_last else "in_out"
        if len(tensor.shape) == 3:
            layout = "experts_out_in" if input_last else "experts_in_out"
        out = tensor.shape[-2 if input_last else -1]
        pieces = self._pieces(out, operations, converter, key)
        if pieces is None:
            return Role("loaded in pieces that cannot be told apart")
        if sum(in_memory.out_pieces) == out:  # gate and up already side by side on disk
            pieces = in_memory.out_pieces
        return Role(layout=layout, out_pieces=pieces, rows_move=bool(set(operations) & _ROW_MOVING))

    def _turned(self, operations: list[str], converter: WeightConverter, tensor: DiskTensor, key: str) -> bool | None:
        """Whether loading transposes the matrix; None when that cannot be said."""
        if "Transpose" not in operations:
            return False
        if operations != ["Transpose"]:
            return None
        if getattr(converter.operations[0], "check_dims", False):
            return tensor.shape != tuple(self.state[key].shape)
        return True

    def _pieces(self, out: int, operations: list[str], converter: WeightConverter, key: str) -> tuple[int, ...] | None:
        """The sizes along the output axis of the parameters that one tensor is cut into."""
        first, *others = converter.target_patterns
        if not {"Chunk", "Split"} & set(operations) or not others:
            return (out,)
        keys = [key, *(key.replace(first, other) for other in others)]
        if len(set(keys) & set(self.state)) != len(converter.target_patterns):
            return None
        sizes = tuple(self.state[name].shape[0] for name in keys)
        return sizes if sum(sizes) == out else None


def _expert_site(site: Site, name: str, pattern: str | None) -> Site | None:
    """The site of the expert whose number stands in `name` where the star stands in the conversion's pattern."""
    after_star = (pattern or "").partition("*")[2]
    number = re.search(rf"\.(\d+){re.escape(after_star)}$", name) if after_star else None
    return site.of_expert(int(number[1])) if number else None


def _moves_rows_only(converter: WeightConverter, tensor: DiskTensor) -> bool:
    """Whether what a conversion reorders is the output axis of [.., out, in], never the input axis."""
    moving = [operation for operation in converter.operations if type(operation).__name__ in _ROW_MOVING]
    return all(getattr(operation, "dim", 0) == len(tensor.shape) - 2 for operation in moving)


def _fused_experts_role(owner: nn.Module, parameter: str, shape: tuple[int, ...]) -> Role:
    """A parameter [E, out, in] or [E, in, out]; transformers' decorator or the sizes tell which."""
    transposed = getattr(owner, "is_transposed", None)
    if transposed is None:
        transposed = _transposed_by_size(owner)
    if transposed is None or len(shape) != 3:
        return Role("experts of unknown layout")
    out = shape[2 if transposed else 1]
    # Gate and up stand side by side in one parameter. Interleaved (gpt-oss) they are one matrix, as it is multiplied.
    halves = "gate_up" in parameter and getattr(owner, "is_concatenated", True)
    pieces = (out // 2, out // 2) if halves else (out,)
    return Role(layout="experts_in_out" if transposed else "experts_out_in", out_pieces=pieces)


def _transposed_by_size(owner: nn.Module) -> bool | None:
    """For expert modules without transformers' decorator: is the hidden size the input axis of gate/up?"""
    if hasattr(owner, "input_size"):  # GraniteMoe, JetMoe: [E, output_size, input_size], applied by F.linear
        return False
    hidden = getattr(owner, "hidden_size", getattr(owner, "hidden_dim", None))
    for name, parameter in owner.named_parameters(recurse=False):
        if parameter.ndim == 3 and parameter.shape[1] != parameter.shape[2] and hidden in parameter.shape[1:]:
            reads_hidden = "down" not in name
            return bool((parameter.shape[1] == hidden) == reads_hidden)
    return None


def _is_experts(owner: nn.Module) -> bool:
    return hasattr(owner, "num_experts") or "Expert" in type(owner).__name__


def _is_square(shape: tuple[int, ...]) -> bool:
    return shape[0] == shape[-1]
