"""transformers' Trainer, set up to keep masks, to say how it goes, and to go on where it was stopped."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tsenor_cli.checkpoint.adapter.skeleton import no_progress_bar
from tsenor_cli.checkpoint.journal import Journal
from tsenor_cli.errors import CheckFailed, TsenorError, is_out_of_memory
from tsenor_cli.observer import Observer
from tsenor_cli.specs import FinetuneSpec
from tsenor_cli.training.callback import KeepMasks

CHECKPOINTS = 3  # of Trainer, beside the output while the third is written, so that one is whole at any time
CHECKPOINT_BYTES = 12  # of each of them, a parameter: a weight and two moments
_LAUNCHED = {"LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
_LAUNCHED |= {"PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}  # of MPI
_NOT_WRITTEN = ("No space left", "PytorchStreamWriter", "unexpected pos")  # of safetensors, of torch.save
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

    Products are in bfloat16 where the device has them (autocast); weights and moments are float32. What launchers of
    processes have set in the environment changes nothing.

    Args:
        model: see above; changed.
        windows: int64 [windows, tokens].
        masks: by name of the parameter.
        spec: how.
        device: where.
        folder: for Trainer's checkpoints, of which there are CHECKPOINTS at most.
        journal: says which of them are whole.
        observer: told of every step.

    Returns:
        The loss of every step, in nats per token.

    Raises:
        CheckFailed: a loss is not finite.
        TsenorError: there is no memory for it, or no room for a checkpoint.
    """
    saved = _last_whole(folder, journal)
    with no_progress_bar(), _plain_words(folder), _no_launcher():
        trainer = _Trainer(
            model,
            _arguments(spec, device, folder),
            train_dataset=[{"input_ids": window, "labels": window} for window in windows],
            callbacks=[KeepMasks(masks), _Told(folder, journal, observer)],
        )
        trainer.remove_callback(PrinterCallback)  # it writes to stdout
        if saved is not None and saved == _checkpoint(folder, spec.steps):  # Trainer would do one more step
            trainer._load_from_checkpoint(str(saved))  # noqa: SLF001  (as it does itself)
            trainer.state = TrainerState.load_from_json(str(saved / TRAINER_STATE_NAME))
        else:
            trainer.train(resume_from_checkpoint=None if saved is None else str(saved))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _last_whole(folder: Path, journal: Journal) -> Path | None:
    """The last checkpoint that is there as it was noted: after a power cut, the journal may be ahead of the files."""
    for note in reversed(journal.notes("saved")):
        saved = _checkpoint(folder, note["step"])
        if note["sizes"] == _sizes(saved):
            return saved
    return None


def _checkpoint(folder: Path, step: int) -> Path:
    return folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _sizes(saved: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in saved.glob("*")}


@contextmanager
def _plain_words(folder: Path) -> Iterator[None]:
    """What memory and disk refuse, as one line each: torch and safetensors have no OSError for a full disk."""
    try:
        yield
    except (MemoryError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            remedy = "--no-resume with a smaller --batch-size and more --accumulate, or --checkpoint-activations"
            raise TsenorError("out of memory in training", remedy, code="out-of-memory") from error
        if not any(words in str(error) for words in _NOT_WRITTEN):
            raise
        what = f"{folder}: a checkpoint of the training could not be written ({str(error).splitlines()[0]})"
        raise TsenorError(what, "free some space, or write elsewhere with -o", code="disk-full") from error


@contextmanager
def _no_launcher() -> Iterator[None]:
    """Without the variables from which accelerate takes a precision, a compiler and the number of processes."""
    before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_") or name in _LAUNCHED}
    for name in before:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


def autocasts(device: torch.device) -> bool:
    """Whether products are in bfloat16 there: where the device has instructions for them."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _arguments(spec: FinetuneSpec, device: torch.device, folder: Path) -> TrainingArguments:
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
        save_total_limit=CHECKPOINTS - 1,  # it takes the oldest away when the newest is there
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would say another loss
        report_to="none",
        disable_tqdm=True,
        **checkpointing,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # noqa: SLF001  (with more it would split batches among all)
    if device.type == "cuda":
        arguments.__dict__["_setup_devices"] = device  # it has taken the first one
        torch.cuda.set_device(device)  # which accelerate asks
    return arguments


class _Trainer(Trainer):
    """Trainer's own way back to a checkpoint leaves out what lies on disk by other names, as experts do."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        assert isinstance(target, PreTrainedModel)
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=torch.float32, local_files_only=True)
        target.load_state_dict(saved.state_dict())


class _Told(TrainerCallback):
    """Tells the observer of steps, and the journal of checkpoints that are whole."""

    def __init__(self, folder: Path, journal: Journal, observer: Observer) -> None:
        self._folder, self._journal, self._observer = folder, journal, observer

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
        saved = _checkpoint(self._folder, state.global_step)
        for path in saved.glob("*"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        self._journal.note("saved", {"step": state.global_step, "sizes": _sizes(saved)})
