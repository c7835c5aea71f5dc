"""The masks of a pruned checkpoint by the names that its weights have in a model.

transformers renames, joins and transposes tensors of some architectures while loading; masks go the same way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tsenor_cli.checkpoint.layouts import LAYOUTS, to_matrices
from tsenor_cli.checkpoint.maskfile import read_mask
from tsenor_cli.checkpoint.reader import Checkpoint, open_checkpoint
from tsenor_cli.checkpoint.soundness import group_counts
from tsenor_cli.errors import InputRefused
from tsenor_cli.report.read import read_report
from tsenor_cli.report.records import TensorRecord
from tsenor_cli.specs import NMPattern

# What DistributedDataParallel and peft put in front of names, and torch.compile and activation checkpointing anywhere.
_INSIDE = r"(_orig_mod|_checkpoint_wrapped_module)\."
_WRAPPERS = re.compile(rf"^((module|base_model\.model)\.|{_INSIDE})+|(?<=\.){_INSIDE}")
_ADAPTED = re.compile(r"(\.base_layer)+\.")  # where peft puts an adapted layer, once for each of its adapted parameters


def model_masks(model: nn.Module, directory: Path | str) -> dict[str, torch.Tensor]:
    """The masks of a checkpoint that `model` was loaded from: by name of the parameter, bool of its shape, True kept.

    Raises:
        InputRefused: the checkpoint has no report, or the model is not one that was loaded from it.
    """
    checkpoint = open_checkpoint(Path(directory))
    on_disk = masks_on_disk(checkpoint)
    if _fit(model, on_disk):
        return on_disk
    from tsenor_cli.checkpoint.adapter.masks import converted_masks  # and with it transformers, which few need here

    converted = converted_masks(checkpoint, on_disk)
    shapes = {name: parameter.shape for name, parameter in parameters_of(model)}
    if missing := [name for name, mask in converted.items() if shapes.get(name) != mask.shape]:
        raise InputRefused(
            f"{directory} has a mask for {missing[0]}, and the model no such parameter of its shape",
            "give the model that was loaded from there",
            code="mask-mismatch",
        )
    if not _fit(model, converted):
        raise InputRefused(f"the model has not the zeros of {directory}", "load it from there", code="mask-mismatch")
    return converted


def masks_on_disk(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The masks of the tensors that the report says were pruned, as the tensors lie on disk.

    Those that `--save-masks` has saved; else what is not zero, so that a kept weight that happens to be zero stays so.
    """
    records = read_report(checkpoint.directory).tensors
    return {record.name: mask_on_disk(checkpoint, record) for record in records if record.action == "pruned"}


def mask_on_disk(checkpoint: Checkpoint, record: TensorRecord) -> torch.Tensor:
    """The mask of one of them.

    Raises:
        InputRefused: the checkpoint has no such tensor, or its saved mask is missing or damaged; or, where none is
            saved, too many weights are not zero.
    """
    tensor = checkpoint.tensors.get(record.name)
    if tensor is None or list(tensor.shape) != record.shape:
        raise InputRefused(
            f"{checkpoint.directory} has no {record.name} as its report describes it",
            "copy the checkpoint again",
            code="damaged-report",
        )
    if record.mask_sha256 is not None:
        return read_mask(tensor)
    mask, pattern = tensor.read() != 0, NMPattern.parse(str(record.pattern), transposable=bool(record.transposable))
    counts = group_counts(to_matrices(mask, LAYOUTS[LAYOUTS.index(record.layout)]), pattern)
    if any(bool((kept > pattern.n).any()) for kept in counts.values()):
        raise InputRefused(
            f"{record.name} in {checkpoint.directory} is not {pattern} any more, as its report says",
            "see tsenor verify; prune it again",
            code="mask-mismatch",
        )
    return mask


def parameters_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the names that they have in the model itself, whatever it is wrapped into."""
    for name, parameter in model.named_parameters():
        yield _ADAPTED.sub(".", _WRAPPERS.sub("", name)), parameter


def masked_parameters(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    """The parameter of every mask, by name.

    Raises:
        InputRefused: a mask has no parameter, or another shape than it.
    """
    parameters = dict(parameters_of(model))
    for name, mask in masks.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != mask.shape:
            found = "none" if parameter is None else f"one of {list(parameter.shape)}"
            raise InputRefused(
                f"the mask {name} of {list(mask.shape)} needs such a parameter, and the model has {found}",
                "give the masks of this model",
                code="mask-mismatch",
            )
    return {name: parameters[name] for name in masks}


def _fit(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> bool:
    """Whether these are the masks of the model's weights, as far as the weights are here."""
    parameters = dict(parameters_of(model))
    return all(
        name in parameters and parameters[name].shape == mask.shape and _zero(parameters[name], ~mask)
        for name, mask in masks.items()
    )


def _zero(parameter: nn.Parameter, dropped: torch.Tensor) -> bool:
    if parameter.is_meta or isinstance(parameter, DTensor):  # not there yet, or in parts
        return True
    return not parameter.detach()[dropped.to(parameter.device)].any()
