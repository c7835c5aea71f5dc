"""Keeps a model's masks through any training that ends in `step()` of a torch optimizer.

Two things are done, and each is needed. What a backward pass leaves in a gradient is masked as soon as it is there, so
that norms, clipping and moments are those of the weights that are trained. And after every step the weights are masked
again, as weight decay, moments from before, or an optimizer that mixes rows would fill the zeros otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from tsenor_cli.errors import CheckFailed
from tsenor_cli.training.masks import masked_parameters, model_masks


def keep_masks(model: nn.Module, masks: Mapping[str, torch.Tensor] | Path | str) -> MaskKeeper:
    """Hold weights at zero where `masks` say so, from now on and through every step of every optimizer.

    Works as it is with gradient accumulation, clipping, mixed precision, gradient scaling, torch.compile,
    DistributedDataParallel and FSDP2 (`fully_shard`), before or after which it may be called.
    One bool per weight with a mask is kept beside the model.

    Args:
        model: to be trained.
        masks: by name of the parameter, bool of its shape, True where a weight stays; or the directory of a checkpoint
            made by `tsenor prune`, from which `model` was loaded.

    Raises:
        InputRefused: a mask has no parameter, or another shape than it.
    """
    return MaskKeeper(model, masks if isinstance(masks, Mapping) else model_masks(model, masks))


class MaskKeeper:
    """The masks of a model in training; made by `keep_masks`, and let go by `remove` or the end of a `with` block."""

    def __init__(self, model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
        self._model = model
        self._dropped = {name: ~mask.bool() for name, mask in masks.items()}
        self._kept: dict[str, _Kept] = {}
        self._removed = False
        self.apply()
        self._step = register_optimizer_step_post_hook(self._stepped)

    def apply(self) -> None:
        """Mask the weights now: for whoever changes them without an optimizer of torch."""
        for kept in self._bound():
            kept.mask(kept.parameter)

    def check(self) -> None:
        """See that every masked weight is zero.

        Raises:
            CheckFailed: one is not.
        """
        for name, kept in zip(self._dropped, self._bound(), strict=True):
            if count := kept.broken():
                raise CheckFailed(f"{name}: {count:,} weights that the mask drops are not zero", code="mask-broken")

    def remove(self) -> None:
        """Let go: nothing is masked any more, unless `apply` is called."""
        self._removed = True
        self._step.remove()
        for kept in self._kept.values():
            kept.release()
        self._kept.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:  # noqa: ANN401  (what step() was called with)
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if stepped.isdisjoint(map(id, self._model.parameters())):
            return  # another model's
        for kept in self._bound():
            if id(kept.parameter) in stepped:
                kept.mask(kept.parameter)

    def _bound(self) -> Iterator[_Kept]:
        """Every mask with the parameter that has its name now: `fully_shard` puts new ones into a model."""
        parameters = masked_parameters(self._model, self._dropped)  # all are there before any is changed
        for name, dropped in self._dropped.items():
            parameter, kept = parameters[name], self._kept.get(name)
            if kept is None or kept.parameter is not parameter:
                if kept is not None:
                    kept.release()
                kept = self._kept[name] = _Kept(parameter, dropped)
            if not self._removed:
                kept.watch()
            yield kept


class _Kept:
    """One parameter, and where its weights are dropped: of a DTensor, in the part that is here."""

    def __init__(self, parameter: nn.Parameter, dropped: torch.Tensor) -> None:
        if isinstance(parameter, DTensor):
            # No process needs another's part of a mask: all have the whole.
            mesh, placements = parameter.device_mesh, parameter.placements
            dropped = distribute_tensor(dropped, mesh, placements, src_data_rank=None).to_local()
        self.parameter = parameter
        self._dropped = dropped
        self._hook: RemovableHandle | None = None

    def watch(self) -> None:
        """Mask its gradients from now on, also those of a time when it is no longer frozen."""
        if self._hook is None and self.parameter.is_floating_point():  # others have no gradients
            trained = self.parameter.requires_grad
            self.parameter.requires_grad_(True)  # else torch takes no hook; it keeps one that it has
            self._hook = self.parameter.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]
            self.parameter.requires_grad_(trained)

    def release(self) -> None:
        """Mask its gradients no more."""
        if self._hook is not None:
            self._hook.remove()

    def mask(self, tensor: torch.Tensor) -> None:
        """Zeros, never negative ones, where weights are dropped; infinities and NaN there go, too."""
        with torch.no_grad():
            _local(tensor).masked_fill_(self._dropped_on(tensor.device), 0)

    def broken(self) -> int:
        """How many dropped weights are not zero."""
        return int(torch.count_nonzero(_local(self.parameter.detach())[self._dropped_on(self.parameter.device)]))

    def _accumulated(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.mask(parameter.grad)

    def _dropped_on(self, device: torch.device) -> torch.Tensor:
        if self._dropped.device != device:  # once: models move after their masks were taken
            self._dropped = self._dropped.to(device)
        return self._dropped


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
