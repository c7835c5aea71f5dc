"""What a pass without values shows of a model: which inputs are the same, and how large what layers hand on is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tsenor_cli.calibration.statistics import Collector
from tsenor_cli.checkpoint.adapter.skeleton import find_layers
from tsenor_cli.checkpoint.site import Site

_PROBE = (2, 8)  # windows of tokens, on the meta device
_PROBE_DTYPE = torch.bfloat16  # without values grouped products are only known for this one


@dataclass
class Look:
    """What a pass without values shows of a model. Bytes are for each token of the text."""

    leaders: Mapping[Site, Site] = field(default_factory=dict)  # see Collector
    hidden_bytes: int = 0  # of the hidden states between two layers, where they are largest
    given_bytes: int = 0  # of what layers are given beside and depends on the tokens: it is kept for every batch
    complete: bool = False  # the pass came to its end: some models look at values


def look_through(model: Any, sites: Collection[Site] = ()) -> Look:  # noqa: ANN401  (a PreTrainedModel)
    """Run a model on the meta device; it is of another dtype afterwards, and in eval mode.

    Args:
        model: on that device.
        sites: linear maps, not of experts, of which to see whose inputs are the same tensor.
    """
    config, itemsize = model.config.get_text_config(), model.dtype.itemsize
    look, collector = Look(hidden_bytes=config.hidden_size * itemsize), Collector(model, sites, gram=True)
    _, layers = find_layers(model)
    with collector.watching(), _watched(layers, look, itemsize), torch.no_grad():
        try:
            model.eval().to(_PROBE_DTYPE)(input_ids=torch.zeros(*_PROBE, dtype=torch.int64, device="meta"))
            look.complete = True
        except Exception:  # noqa: BLE001, S110  (foreign code that may look at values)
            pass
    look.leaders = collector.leaders
    return look


@contextmanager
def _watched(layers: Iterable[nn.Module], look: Look, itemsize: int) -> Iterator[None]:
    """Note what goes into layers and comes out; itemsize is that of the dtype in which the model will run."""
    windows, tokens = _PROBE
    counted: list[torch.Tensor] = []  # what all layers share counts once

    def per_token(tensor: torch.Tensor) -> int:
        return tensor.numel() * (itemsize if tensor.dtype == _PROBE_DTYPE else tensor.itemsize) // (windows * tokens)

    def note(hidden: Any) -> None:  # noqa: ANN401  (tensor or tuple)
        hidden = hidden if isinstance(hidden, torch.Tensor) else hidden[0]
        look.hidden_bytes = max(look.hidden_bytes, per_token(hidden))

    def before(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        note(hidden)
        for tensor in _tensors([*args, *kwargs.values()]):
            own = tensor is not hidden and tensor.is_floating_point() and tensor.shape[:2] == (windows, tokens)
            if own and all(tensor is not other for other in counted):
                counted.append(tensor)
                look.given_bytes += per_token(tensor)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(lambda _layer, _given, output: note(output)).remove)
        yield


def _tensors(values: Sequence[Any]) -> Iterator[torch.Tensor]:
    """Of nested tuples."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
