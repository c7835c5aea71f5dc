"""The forward pass of a model, one decoder layer in memory at a time, equal to the whole one bit by bit.

An *identity pass* runs the model with layers that return what they were given; whatever else the model hands to each
layer (masks, rotary angles, shared states) is recorded on the way. The real layers are then run one after the other on
the recorded arguments. What this cannot be exact for is refused: layers that are called twice, out of order, or with
something done to the hidden states in between.
"""

from __future__ import annotations

import ctypes
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from tsenor_cli.calibration.activations import Activations
from tsenor_cli.errors import InputRefused

if TYPE_CHECKING:
    from tsenor_cli.checkpoint.adapter.skeleton import Skeleton

BATCH_TOKENS = 2048
_REMEDY = "use --method magnitude, which needs no calibration"
# How layers return their hidden states: as they are (transformers 5), or first in a tuple (older code).
_Form = Callable[[torch.Tensor], Any]
_FORMS: tuple[_Form, ...] = (lambda hidden: hidden, lambda hidden: (hidden,))
_PROBE_TOKENS = 8  # enough to see the course of a forward pass; the head of a large vocabulary is not free


@dataclass(frozen=True)
class _Call:
    """What one layer was called with, its hidden states left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: bool  # the hidden states are passed as `hidden_states=`

    def __call__(self, layer: nn.Module, hidden: torch.Tensor) -> Any:  # noqa: ANN401  (tensor or tuple)
        if self.keyword:
            return layer(*self.args, hidden_states=hidden, **self.kwargs)
        return layer(hidden, *self.args, **self.kwargs)


class Replay:
    """Batches of tokens on their way through a model.

    Args:
        skeleton: the model.
        batches: int64 [sequences, tokens] each, without padding. Hidden states stay on the CPU between two layers.
        spill_to: a directory for the hidden states; None keeps them in memory.

    Raises:
        InputRefused: the model does more between its layers than hand on hidden states.
    """

    def __init__(self, skeleton: Skeleton, batches: Sequence[torch.Tensor], spill_to: Path | None = None) -> None:
        self._skeleton = skeleton
        self._batches = [tokens.to(skeleton.device) for tokens in batches]
        self._calls: list[list[_Call]] = []
        self.hidden = Activations(spill_to)
        parameters = inspect.signature(skeleton.model.forward).parameters
        if "input_ids" not in parameters:
            raise self._refusal("it reads no text")
        self._options = {"use_cache": False} if "use_cache" in parameters else {}
        _forget_caches(skeleton.model)
        if not self._batches:  # there are more processes than batches
            return
        self._form = self._find_form(self._batches[0][:1, :_PROBE_TOKENS])
        for tokens in self._batches:
            states, calls = self._identity_pass(tokens, self._form)
            self._calls.append(_share(calls, self._calls[0]) if self._calls else calls)
            self.hidden.append(states.cpu())
            return_freed_memory()  # what layers are given may stand in the midst of it, and be as large

    def __len__(self) -> int:
        return len(self._batches)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hidden.close()

    @torch.no_grad()
    def run(self, index: int, layer: nn.Module, batch: int) -> torch.Tensor:
        """Hidden states [sequences, tokens, hidden] of one batch after the layer `index`; they are not kept here."""
        states = self._hidden(batch)
        output = self._calls[batch][index](layer, states)
        expected = type(self._form(states))
        if type(output) is not expected:
            raise self._refusal(f"layer {index} returns a {type(output).__name__}, not a {expected.__name__}")
        after: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
        return after

    def advance(self, index: int, layer: nn.Module) -> None:
        """Take every batch through the layer `index`."""
        for batch in range(len(self)):
            self.hidden[batch] = self.run(index, layer, batch).cpu()

    @torch.no_grad()
    def logits(self, batch: int) -> torch.Tensor:
        """Logits [sequences, tokens, vocabulary] of a batch that has passed every layer: the model's own last part."""
        last = len(self._skeleton.layers) - 1

        def answer(index: int, _call: _Call, hidden: torch.Tensor) -> Any:  # noqa: ANN401
            return self._form(self._hidden(batch) if index == last else hidden)

        with self._instead_of_layers(answer):
            found: torch.Tensor = self._forward(self._batches[batch]).logits
        return found

    def _hidden(self, batch: int) -> torch.Tensor:
        return self.hidden[batch].to(self._skeleton.device)

    def _find_form(self, tokens: torch.Tensor) -> _Form:
        """How layers return their hidden states: the first form with which the model runs to its end."""
        problems: list[Exception] = []
        for form in _FORMS:
            try:
                self._identity_pass(tokens, form, to_the_end=True)
            except InputRefused:
                raise
            except Exception as error:  # noqa: BLE001  (foreign code that was given a form it may not expect)
                problems.append(error)
            else:
                return form
        why = problems[0] if isinstance(problems[0], _ChangedError) else f"{type(problems[0]).__name__}: {problems[0]}"
        raise self._refusal(f"with layers that return what they are given, {why}") from problems[0]

    @torch.no_grad()
    def _identity_pass(
        self, tokens: torch.Tensor, form: _Form, *, to_the_end: bool = False
    ) -> tuple[torch.Tensor, list[_Call]]:
        """The hidden states before the first layer, and the call of every layer; `to_the_end` runs the head too."""
        calls: list[_Call] = []
        states: list[torch.Tensor] = []
        marks: list[Any] = []

        def record(index: int, call: _Call, hidden: torch.Tensor) -> Any:  # noqa: ANN401
            if index != len(calls):
                expected = f"layer {len(calls)}" if len(calls) < len(self._skeleton.layers) else "the end"
                raise self._refusal(f"layer {index} is called where {expected} is expected")
            states.append(hidden)
            calls.append(call)
            marks.append(_mark(hidden))
            if marks[-1] != marks[0]:
                raise _ChangedError
            if len(calls) == len(self._skeleton.layers) and not to_the_end:
                raise _LastLayerError
            return form(hidden)

        with self._instead_of_layers(record), suppress(_LastLayerError):
            self._forward(tokens)
        if len(calls) < len(self._skeleton.layers):
            raise self._refusal(f"only {len(calls)} of its {len(self._skeleton.layers)} layers are called")
        return states[0], calls

    def _forward(self, tokens: torch.Tensor) -> Any:  # noqa: ANN401  (an output class of transformers)
        return self._skeleton.model(input_ids=tokens, **self._options)

    @contextmanager
    def _instead_of_layers(self, answer: Callable[[int, _Call, torch.Tensor], Any]) -> Iterator[None]:
        """Let `answer` speak for every layer."""

        def forward(index: int) -> Callable[..., Any]:
            def called(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
                if args:
                    return answer(index, _Call(args[1:], kwargs, keyword=False), args[0])
                hidden = kwargs.pop("hidden_states")
                return answer(index, _Call((), kwargs, keyword=True), hidden)

            return called

        layers = list(self._skeleton.layers)
        for index, layer in enumerate(layers):
            layer.forward = forward(index)  # on the object, where it hides the method of the class
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _refusal(self, why: str) -> InputRefused:
        return InputRefused(
            f"{type(self._skeleton.model).__name__} cannot be run layer by layer ({why})",
            _REMEDY,
            code="layerwise-unsupported",
        )


class _LastLayerError(Exception):
    """Not a failure: what comes after the last layer is not wanted yet."""


class _ChangedError(Exception):
    def __str__(self) -> str:
        return "something is done to the hidden states in between"


def return_freed_memory() -> None:
    """Let the C library give back what has been freed: else the holes that tensors leave grow layer by layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc has it
    if trim is not None:
        trim(0)


def _forget_caches(model: nn.Module) -> None:
    """Not every model lets itself be told in the call; a layer that runs twice must not meet its own keys again."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False


def _mark(hidden: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two views of the same values in the same memory, nothing written to it in the meantime."""
    return hidden.data_ptr(), hidden.shape, hidden.stride(), hidden._version  # noqa: SLF001  (counts writes)


def _share(calls: list[_Call], first: list[_Call]) -> list[_Call]:
    """`calls` with the tensors of the first batch where they are equal: masks are the same for every batch."""
    return [
        _Call(
            _merge(call.args, old.args),
            {key: _merge(value, old.kwargs.get(key)) for key, value in call.kwargs.items()},
            call.keyword,
        )
        for call, old in zip(calls, first, strict=True)
    ]


def _merge(new: Any, old: Any) -> Any:  # noqa: ANN401
    if isinstance(new, torch.Tensor):
        same = isinstance(old, torch.Tensor) and (old.shape, old.dtype) == (new.shape, new.dtype)
        return old if same and torch.equal(old, new) else new
    if type(new) is tuple and type(old) is tuple and len(new) == len(old):
        return tuple(_merge(a, b) for a, b in zip(new, old, strict=True))
    return new  # a dict may be one that layers write into: each batch has its own


def batches(windows: torch.Tensor) -> list[torch.Tensor]:
    """Windows [samples, tokens] in batches of about BATCH_TOKENS tokens."""
    return list(torch.split(windows, max(1, BATCH_TOKENS // windows.shape[1])))
