"""Perplexity by streaming layers: the whole model is never in memory.

exp of the mean loss per predicted token; the text is cut into windows that do not overlap, a window sees nothing of
the one before, and its first token is context only.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from tsenor_cli.calibration.replay import Replay, batches
from tsenor_cli.device import CPU
from tsenor_cli.distributed import Team
from tsenor_cli.errors import InputRefused, TsenorError, budget_too_small
from tsenor_cli.observer import Observer

if TYPE_CHECKING:
    from tsenor_cli.calibration.tokens import TextTokens
    from tsenor_cli.checkpoint.adapter.skeleton import Skeleton
    from tsenor_cli.checkpoint.reader import Checkpoint

_CHUNK = 256  # tokens whose logits are in float32 at a time
_FLOAT_BYTES = 2 * 4  # of a logit then: itself, and its log-probability
_LARGEST_LOSS = math.log(sys.float_info.max)  # of which there is a perplexity


@dataclass(frozen=True)
class Perplexity:
    """A figure, and everything it depends on."""

    perplexity: float
    mean_loss: float  # nats per predicted token
    predicted_tokens: int
    dtype: str  # what the model computes in
    tokens: TextTokens

    def to_dict(self) -> dict[str, Any]:
        return {
            "perplexity": self.perplexity,
            "mean_loss": self.mean_loss,
            "predicted_tokens": self.predicted_tokens,
            "dtype": self.dtype,
            **self.tokens.to_dict(),
        }


@contextmanager
def _own_remedy() -> Iterator[None]:
    """To a model that cannot be run layer by layer, another method of pruning is no help here."""
    try:
        yield
    except InputRefused as error:
        if error.code != "layerwise-unsupported":
            raise
        raise InputRefused(error.message, "leave its perplexity out, or take another model", code=error.code) from error


@_own_remedy()
def measure_perplexity(
    checkpoint: Checkpoint,
    tokens: TextTokens,
    observer: Observer,
    memory_budget: int | None = None,
    device: torch.device = CPU,
    team: Team | None = None,
) -> Perplexity:
    """Perplexity on `tokens.windows`, in the checkpoint's own dtype, if the device can (see device.computed_in).

    The windows are shared among the processes of a team, and the figure is that of one. Hidden states
    go to the directory for temporary files (TMPDIR) if they do not fit into the memory budget, in bytes.

    Raises:
        InputRefused: not a causal language model, or one that cannot be run layer by layer.
        UsageError: the memory budget is too small, even with the hidden states on disk.
        TsenorError: the loss is not finite, or beyond all bounds.
    """
    from tsenor_cli.checkpoint.adapter.skeleton import Skeleton

    skeleton = Skeleton(checkpoint, device)
    if not skeleton.model.can_generate():
        raise InputRefused(
            f"{type(skeleton.model).__name__} predicts no next token: it has no perplexity",
            "evaluate another model",
            code="unsupported-model",
        )
    team = team or Team()
    windows = batches(tokens.windows)[team.rank :: team.size]
    spills = memory_budget is not None and _spills(skeleton, tokens.windows, memory_budget)
    with Replay(skeleton, windows, Path(tempfile.gettempdir()) if spills else None) as replay:
        for index in range(len(skeleton.layers)):
            observer.entered(f"evaluating layer {index + 1} of {len(skeleton.layers)}")
            replay.advance(index, skeleton.load_layer(index))
            skeleton.drop_layer(index)
        losses = [_loss(replay.logits(batch), wanted.to(device)) for batch, wanted in enumerate(windows)]
    predicted = tokens.windows[:, 1:].numel()
    mean = math.fsum(loss for part in team.gather(losses) for loss in part) / predicted
    if not mean <= _LARGEST_LOSS:
        raise TsenorError(
            f"{checkpoint.directory}: the loss is {mean:g} per token",
            "the model overflows in its dtype",
            code="overflow",
        )
    return Perplexity(math.exp(mean), mean, predicted, str(skeleton.model.dtype).removeprefix("torch."), tokens)


def _spills(skeleton: Skeleton, windows: torch.Tensor, budget: int) -> bool:
    """Whether the hidden states have no room beside all that is not a layer, and two layers or, at last, logits.

    Raises:
        UsageError: the others have none without them.
    """
    from tsenor_cli.calibration.look import look_through
    from tsenor_cli.calibration.memory import attention_bytes
    from tsenor_cli.checkpoint.adapter.meta import meta_model

    config, itemsize = skeleton.model.config.get_text_config(), skeleton.model.dtype.itemsize
    look = look_through(meta_model(skeleton.checkpoint, skeleton.device))
    largest = max(sum(t.nbytes for t in skeleton.tensors_of(i)) for i in range(len(skeleton.layers)))
    running = 2 * largest + attention_bytes(config, windows.shape[1], itemsize)
    logits: int = (batches(windows)[0].numel() * itemsize + _CHUNK * _FLOAT_BYTES) * config.vocab_size
    others: int = skeleton.outside_bytes() + windows.numel() * look.given_bytes + max(running, logits)
    if others > budget:
        raise budget_too_small(budget, others)
    return others + windows.numel() * look.hidden_bytes > budget


def _loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Σ over the predicted tokens of -log p, float32 summed in float64; logits [sequences, tokens, vocabulary]."""
    parts = [
        cross_entropy(row.float(), wanted, reduction="none").double().sum()
        for sequence, target in zip(logits[:, :-1], tokens[:, 1:], strict=True)
        for row, wanted in zip(sequence.split(_CHUNK), target.split(_CHUNK), strict=True)
    ]
    return math.fsum(part.item() for part in parts)
