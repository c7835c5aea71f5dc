"""Linear layers whose forward and backward pass both run 2:4 kernels, for weights that are 2:4 along rows and columns.

Of the three products of a training step, x Wᵀ and dy W are sparse; dW = dyᵀ x is dense, so that masks can be kept by
whoever keeps them. Nothing but the class of a layer changes: parameters, their names, hooks and optimizers stay.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from tsenor_cli.errors import CheckFailed, InputRefused, UsageError
from tsenor_cli.training import packing
from tsenor_cli.training.packing import Packed

_ONES = 0x01010101  # in each byte of a word
_UP_TO_HIGHEST = 0x7D * _ONES  # brings a byte above 2 to its highest bit
_HIGHEST = 0x80 * _ONES - (1 << 32)


@dataclass(frozen=True)
class Swap:
    """What became of one Linear."""

    name: str  # of its weight
    kernels: str | None  # whose kernels run it, if it is sparse now
    reason: str | None  # why it stays dense, if it does

    def __str__(self) -> str:
        return f"{self.name}: " + (f"dense, {self.reason}" if self.reason else f"sparse both ways, {self.kernels}")


def sparsify_for_training(
    model: nn.Module, names: Collection[str] | None = None, *, autocast: torch.dtype | None = None
) -> list[Swap]:
    """Swap every Linear of `model` that 2:4 kernels can run both ways, in place, and say what became of each.

    What an earlier call has swapped is looked at anew.

    A weight is packed when it is first used and after every change, which torch's version counter tells: in-place
    operations and optimizers of torch raise it. What writes behind it, through `.data` or as FSDP and ZeRO do, goes
    unseen until the next change that does not. Packing checks the pattern anew, as masks may have been lost: that
    reads the weight once more and waits for the GPU, and is in the time that `tsenor bench training` calls packing.

    Args:
        model: on the device that it is trained on, in the dtype that it is trained in.
        names: of weights, such as "model.layers.0.mlp.up_proj.weight"; all if None.
        autocast: the dtype of the torch.autocast under which the model will run, if it will.

    Raises:
        UsageError: a name is that of no Linear; nothing has been swapped.
    """
    layers = {f"{name}.weight".lstrip("."): one for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    if unknown := sorted(set(names or ()) - set(layers)):
        raise UsageError(f"no Linear has a weight {unknown[0]!r}", "give names as in named_parameters()")
    densify(model)
    swaps = []
    for name, layer in layers.items():
        selected = names is None or name in names
        kernels, reason = _choose(layer, autocast) if selected else (None, "not selected")
        if reason is None:
            layer.__class__ = SemiStructuredLinear
        swaps.append(Swap(name, kernels, reason))
    return swaps


def densify(model: nn.Module) -> None:
    """Make plain Linear layers of those that `sparsify_for_training` has swapped."""
    for layer in model.modules():
        if type(layer) is SemiStructuredLinear:
            layer.__dict__.pop("_memory", None)
            layer.__class__ = nn.Linear  # type: ignore[assignment]


def _choose(layer: nn.Linear, autocast: torch.dtype | None) -> tuple[str | None, str | None]:
    """Whose kernels can run a layer, and if none can, why."""
    if type(layer) is not nn.Linear:
        return None, f"it is a {type(layer).__name__}, no plain Linear"
    if type(layer.weight) is not nn.Parameter:  # computed, sharded or quantised: its changes could not be seen
        return None, f"its weight is a {type(layer.weight).__name__}, no plain Parameter"
    kernels = packing.find_kernels(layer.weight.device)
    if isinstance(kernels, str):
        return None, kernels
    dtype, shape = autocast or layer.weight.dtype, list(layer.weight.shape)
    if dtype not in kernels.dtypes:
        return None, f"{kernels.name} has no kernels for {dtype}"
    if any(size == 0 or size % kernels.multiple for size in shape):
        return None, f"{kernels.name} wants multiples of {kernels.multiple}, not {shape}"
    if not is_two_of_four(layer.weight):
        return None, "its weight is not 2:4 along rows and columns"
    return kernels.name, None


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Whether of every 4 entries along rows and along columns at most 2 are nonzero; [out, in], multiples of 4.

    Four entries of a row are counted as the bytes of a word.
    """
    words = (weight.detach() != 0).contiguous().view(torch.int32)
    too_full = (words * _ONES >> 24 > 2).any()  # the highest byte of the product is the sum of all
    along_columns = words.view(len(words) // 4, 4, -1).sum(1, dtype=torch.int32)
    return not too_full | (along_columns + _UP_TO_HIGHEST & _HIGHEST).any()


def pack_weight(weight: torch.Tensor, dtype: torch.dtype) -> Packed:
    """Pack a weight [out, in] that is 2:4 along rows and columns, as `dtype`, for both products.

    Raises:
        CheckFailed: it is not 2:4 any more. The kernels would drop what is too much.
        InputRefused: its device has no kernels, or they do not take `dtype`.
    """
    kernels = packing.find_kernels(weight.device)
    if isinstance(kernels, str):
        raise InputRefused(kernels, "call densify() before the model is moved", code="no-gpu")
    if dtype not in kernels.dtypes:
        raise InputRefused(f"{kernels.name} has no kernels for {dtype}", "run the model under torch.autocast")
    if not is_two_of_four(weight):
        raise CheckFailed(
            f"a weight {list(weight.shape)} is not 2:4 along rows and columns any more",
            "keep the masks during training, or call densify()",
        )
    return kernels.pack(weight.detach().to(dtype).contiguous())


def two_of_four_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, packed: Packed
) -> torch.Tensor:
    """Compute x Wᵀ + bias, with gradients for x [.., in], `weight` [out, in] and `bias`, once differentiable.

    W is what `packed` holds, and `weight` is there for its gradient; all have one dtype, `weight` any.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y: torch.Tensor = _Linear.apply(rows, weight, bias, packed)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """See two_of_four_linear; x [tokens, in]. The kernels pad the tokens, and read operands as if contiguous."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: torch.Tensor,
        _weight: torch.Tensor,
        bias: torch.Tensor | None,
        packed: Packed,
    ) -> torch.Tensor:
        ctx.backward_operand = packed.backward
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        return linear(x, packed.forward, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        (x,) = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        dy = dy.contiguous()  # that of a sum, for example, is one number expanded
        return (
            dy @ ctx.backward_operand if wants_x else None,
            dy.t() @ x if wants_weight else None,
            dy.sum(0) if wants_bias else None,
            None,
        )


@dataclass(frozen=True)
class _Memory:
    """A packed weight, and what it was packed from."""

    weight: weakref.ref[torch.Tensor]
    state: tuple[object, ...]
    packed: Packed


class SemiStructuredLinear(nn.Linear):
    """A Linear that runs 2:4 kernels; made by `sparsify_for_training`, never directly."""

    _memory: _Memory | None = None  # of the class: a swapped layer has had no __init__

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  (the name that nn.Linear gives it)
        if input.numel() == 0:  # an expert without tokens
            return super().forward(input)
        device = input.device.type
        if not torch.is_autocast_enabled(device):
            return two_of_four_linear(input, self.weight, self.bias, self._packed(self.weight.dtype))
        dtype = torch.get_autocast_dtype(device)
        bias = None if self.bias is None else self.bias.to(dtype)
        return two_of_four_linear(input.to(dtype), self.weight, bias, self._packed(dtype))

    def _packed(self, dtype: torch.dtype) -> Packed:
        """Once per change of the weight, not per forward pass: micro-batches and recomputed layers share it."""
        state = (self.weight._version, self.weight.data_ptr(), dtype)  # noqa: SLF001  (its only name)
        memory = self._memory
        if memory is None or memory.weight() is not self.weight or memory.state != state:
            self._memory = None  # two are never held at once
            self._memory = memory = _Memory(weakref.ref(self.weight), state, pack_weight(self.weight, dtype))
        return memory.packed

    def __getstate__(self) -> dict[str, Any]:
        """Without what is packed, which can be neither copied nor written."""
        return {name: value for name, value in self.__dict__.items() if name != "_memory"}
