"""transformers' Trainer, set up to keep masks, to say how it goes, and to go on where it was stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tsenor_cli.checkpoint.adapter.skeleton import no_progress_bar
from tsenor_cli.checkpoint.journal import Journal
from tsenor_cli.errors import CheckFailed
from tsenor_cli.observer import Observer
from tsenor_cli.specs import FinetuneSpec
from tsenor_cli.training.callback import KeepMasks

_CHECKPOINTING = [  # the second is what transformers called it before
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
][:1]


def train(
    model: PreTrainedModel,
    windows: torch.Tensor,
    masks: Mapping[str, torch.Tensor],
    spec: FinetuneSpec,
    device: torch.device,
    folder: Path,
    journal: Journal,
    observer: Observer,
) -> list[float]:
    """Train all weights of `model`, float32, to predict the next token of `windows`, and keep its masks.

    Products are in bfloat16 where the device has them (autocast); weights and moments are float32.

    Args:
        model: see above; changed.
        windows: int64 [windows, tokens].
        masks: by name of the parameter.
        spec: how.
        device: where.
        folder: for Trainer's checkpoints, of which there are two at most.
        journal: says which of them are whole.
        observer: told of every step.

    Returns:
        The loss of every step, in nats per token.

    Raises:
        CheckFailed: a loss is not finite.
    """
    trainer = Trainer(
        model,
        _arguments(spec, device, folder),
        train_dataset=[{"input_ids": window, "labels": window} for window in windows],
        callbacks=[KeepMasks(masks), _Told(journal, observer)],
    )
    trainer.remove_callback(PrinterCallback)  # it writes to stdout
    saved = [folder / f"checkpoint-{note['step']}" for note in journal.notes("saved")]
    with no_progress_bar():
        trainer.train(resume_from_checkpoint=next((str(path) for path in reversed(saved) if path.is_dir()), None))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def autocasts(device: torch.device) -> bool:
    """Whether products are in bfloat16 there."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def _arguments(spec: FinetuneSpec, device: torch.device, folder: Path) -> TrainingArguments:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # which accelerate asks
    checkpointing: dict[str, Any] = dict.fromkeys(_CHECKPOINTING if spec.checkpoint_activations else (), True)
    arguments = TrainingArguments(
        str(folder),
        max_steps=spec.steps,
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.accumulate,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(spec.warmup * spec.steps),
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.clip,
        seed=spec.seed,
        bf16=autocasts(device),
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        save_steps=spec.save_every,
        save_total_limit=2,  # one of them is whole at any time
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would say another loss
        report_to="none",
        disable_tqdm=True,
        **checkpointing,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # noqa: SLF001  (with more it would split batches among all)
    return arguments


class _Told(TrainerCallback):
    """Tells the observer of steps, and the journal of checkpoints that are whole."""

    def __init__(self, journal: Journal, observer: Observer) -> None:
        self._journal, self._observer = journal, observer

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:  # noqa: ANN401, ARG002
        loss = given["logs"].get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise CheckFailed(
                f"training has diverged: the loss of step {state.global_step} is {loss}",
                "take a smaller --learning-rate",
                code="diverged",
            )
        self._observer.trained(state.global_step, state.max_steps, loss)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ANN401, ARG002
        self._journal.note("saved", {"step": state.global_step})
