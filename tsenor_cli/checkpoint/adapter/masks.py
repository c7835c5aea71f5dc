"""Masks as transformers would load them: through the conversion that the weights go through."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from tsenor_cli.checkpoint.adapter.skeleton import Skeleton
from tsenor_cli.checkpoint.reader import Checkpoint
from tsenor_cli.checkpoint.shard import DiskTensor


def converted_masks(checkpoint: Checkpoint, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Masks of tensors on disk as masks of the model's parameters, one layer at a time.

    Conversion moves weights and changes none, so that of zeros and ones it makes zeros and ones. Tensors without a
    mask go along as ones. A mask of a tensor that the model has no use for is left out.

    Raises:
        InputRefused: layers cannot be recognised.
    """
    skeleton = Skeleton(checkpoint)

    def numbers(tensors: Iterable[DiskTensor]) -> dict[str, torch.Tensor]:
        ones = {tensor.name: torch.ones(tensor.shape) for tensor in tensors}
        return {name: masks.get(name, one).to(skeleton.model.dtype) for name, one in ones.items()}

    skeleton.load_outside(numbers(t for t in checkpoint.tensors.values() if t.name not in skeleton.layer_of))
    found = dict(_masked(skeleton, f"{skeleton.layers_name}.", outside=True))
    for index in range(len(skeleton.layers)):
        skeleton.load_layer(index, numbers(skeleton.tensors_of(index)))
        found |= _masked(skeleton, f"{skeleton.layers_name}.{index}.")
        skeleton.drop_layer(index)
    return found


def _masked(skeleton: Skeleton, prefix: str, *, outside: bool = False) -> dict[str, torch.Tensor]:
    """The parameters under `prefix`, or outside of it, that are not all ones."""
    found = {
        name: parameter != 0
        for name, parameter in skeleton.model.named_parameters()
        if name.startswith(prefix) != outside
    }
    return {name: mask for name, mask in found.items() if not mask.all()}
