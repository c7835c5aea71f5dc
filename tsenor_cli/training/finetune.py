"""`tsenor finetune`: load the sparse model → train it under its masks → write it in the layout it had → verify."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tsenor_cli import __version__
from tsenor_cli.calibration.perplexity import measure_perplexity
from tsenor_cli.calibration.tokens import TextTokens, all_windows, calibration_windows
from tsenor_cli.checkpoint.adapter.tokenizer import CheckpointTokenizer, window_length
from tsenor_cli.checkpoint.adapter.whole import load_model, weights_on_disk
from tsenor_cli.checkpoint.journal import Identity
from tsenor_cli.checkpoint.maskfile import saved_masks
from tsenor_cli.checkpoint.reader import Checkpoint, open_checkpoint
from tsenor_cli.checkpoint.source import resolve_checkpoint
from tsenor_cli.checkpoint.staging import (
    Staged,
    already_finished,
    check_output,
    check_space,
    identity_sha256,
    staged_output,
)
from tsenor_cli.checkpoint.verifier import verify_checkpoint
from tsenor_cli.checkpoint.writer import (
    CARD_FILE,
    PAGE_FILE,
    REPORT_FILE,
    WRITTEN_ANEW,
    OutputShards,
    as_bytes,
    copy_file,
    write_text,
)
from tsenor_cli.device import device_name, find_device
from tsenor_cli.errors import CheckFailed, InputRefused, TsenorError, UsageError
from tsenor_cli.identity import model_identity, option_name, text_identity
from tsenor_cli.job import absolute
from tsenor_cli.observer import Observer
from tsenor_cli.report import page
from tsenor_cli.report.card import training_card
from tsenor_cli.report.costs import Costs
from tsenor_cli.report.read import read_report
from tsenor_cli.report.records import Report, TensorRecord
from tsenor_cli.specs import FinetuneSpec
from tsenor_cli.training.masks import mask_on_disk, model_masks
from tsenor_cli.training.trainer import CHECKPOINT_BYTES, CHECKPOINTS, autocasts, train
from tsenor_cli.versions import versions

_MOST_HELD_OUT, _HELD_OUT_EVERY = 64, 20
_OPTIONS = {"sequence_length", "steps", "batch_size", "accumulate", "learning_rate", "warmup", "weight_decay", "clip"}
_OPTIONS |= {"checkpoint_activations", "field", "seed"}


@dataclass(frozen=True)
class _Job:
    """A training that can begin: what can be refused before anything is written has been."""

    spec: FinetuneSpec
    output: Path
    checkpoint: Checkpoint
    pruned: Report  # what the checkpoint says of itself
    tokens: TextTokens
    eval_tokens: TextTokens
    device: torch.device
    identity: Identity


def finetune(spec: FinetuneSpec, observer: Observer | None = None) -> Report:
    """Train a checkpoint that `prune` has made, its masks kept, and write it to `spec.output` once it is verified.

    The whole model is in memory in float32, with its gradients and the two moments of AdamW, and a byte per weight for
    masks and one for what they drop: 18 bytes a parameter. Beside the output are up to CHECKPOINTS of Trainer's.

    Raises:
        UsageError, InputRefused, OutputUnavailable, TsenorError: as prune.
        CheckFailed: training has diverged, or the pattern has not held; then there is no output.
    """
    observer, costs = observer or Observer(), Costs()
    job = _prepare(spec)
    if isinstance(job, Report):
        return job
    costs.spent("planning")
    with staged_output(job.output, job.identity, overwrite=spec.overwrite, resume=spec.resume) as staged:
        if not staged.journal.notes("perplexity"):
            staged.journal.note("perplexity", _perplexity(job, job.checkpoint, observer))
        costs.spent("perplexity")
        model = load_model(job.checkpoint)
        masks = model_masks(model, job.checkpoint.directory)
        folder = staged.scratch / "trainer"
        losses = train(model, job.tokens.windows, masks, spec, job.device, folder, staged.journal, observer)
        costs.spent("training")
        weights = {tensor.name: weight for tensor, weight in weights_on_disk(model, job.checkpoint)}
        del model, masks
        records = _write(job, weights, staged)
        costs.spent("finishing")
        after = _perplexity_after(job, staged.directory, observer)
        costs.spent("perplexity")
        report = _report(job, records, losses, {"before": staged.journal.notes("perplexity")[0], "after": after}, costs)
        write_text(staged.directory / REPORT_FILE, report.to_json())
        _verify(staged.directory, observer)
        write_text(staged.directory / CARD_FILE, training_card(job.checkpoint, report))
        write_text(staged.directory / PAGE_FILE, page.report_page(report))
    return report


def _prepare(spec: FinetuneSpec) -> _Job | Report:
    """The job, or the report of it if it is done already."""
    if find_spec("accelerate") is None:
        raise UsageError(
            "fine-tuning needs the package accelerate", "pip install 'tsenor[train]'", code="missing-extra"
        )
    if re.fullmatch("[0-9]+", size := os.environ.get("WORLD_SIZE", "")) and int(size) > 1:
        raise UsageError("tsenor finetune is for one process", "train with several by a script, with keep_masks")
    output, device = absolute(spec.output), find_device(spec.device)
    checkpoint = open_checkpoint(*resolve_checkpoint(spec.model))
    check_output(output, checkpoint.directory, overwrite=spec.overwrite or spec.resume is True)
    pruned = read_report(checkpoint.directory)
    if checkpoint.config.get("quantization_config") is not None:
        raise InputRefused(f"{spec.model} is quantised", "fine-tune it before", code="quantised-checkpoint")
    for record in pruned.tensors:
        if record.action == "pruned":
            mask_on_disk(checkpoint, record)  # refused now, and not after perplexity has been measured
    tokens, eval_tokens = _texts(spec, checkpoint)
    identity = _identity(spec, checkpoint, device_name(device), tokens, eval_tokens)
    if spec.resume and already_finished(output, identity):
        return read_report(output)
    check_output(output, checkpoint.directory, overwrite=spec.overwrite)
    parameters = sum(tensor.parameters for tensor in checkpoint.tensors.values())
    check_space(output, checkpoint.nbytes + checkpoint.other_bytes + CHECKPOINTS * CHECKPOINT_BYTES * parameters)
    return _Job(spec, output, checkpoint, pruned, tokens, eval_tokens, device, identity)


def _texts(spec: FinetuneSpec, checkpoint: Checkpoint) -> tuple[TextTokens, TextTokens]:
    """What is learned, as many windows as the steps need if there are, and what perplexity is measured on."""
    tokenizer, length = CheckpointTokenizer(checkpoint.directory), window_length(checkpoint, spec.sequence_length)
    needed = spec.steps * spec.batch_size * spec.accumulate
    samples = needed if spec.eval_text is not None else needed + _MOST_HELD_OUT
    tokens = calibration_windows(spec.text, tokenizer, samples=samples, length=length, seed=spec.seed, field=spec.field)
    if spec.eval_text is not None:
        return tokens, all_windows(spec.eval_text, tokenizer, length=length, field=spec.field)
    held_out = min(_MOST_HELD_OUT, -(-len(tokens.windows) // _HELD_OUT_EVERY))
    if held_out == len(tokens.windows):
        raise InputRefused(
            f"{spec.text} has one window of {length} tokens, and perplexity needs another",
            "give more text, or --eval",
            code="too-few-tokens",
        )
    learned, kept_back = tokens.windows[:-held_out], tokens.windows[-held_out:]
    return replace(tokens, windows=learned), replace(tokens, windows=kept_back)


def _identity(
    spec: FinetuneSpec, checkpoint: Checkpoint, device: str, tokens: TextTokens, eval_tokens: TextTokens
) -> Identity:
    """Everything that decides the bytes, by the names that users know (see identity.py)."""
    found = {"tsenor": __version__, **_versions(), "the device": device, "the command": "finetune"}
    found |= {option_name(name): str(getattr(spec, name)) for name in _OPTIONS}
    found["the number of threads"] = str(torch.get_num_threads())
    found |= {"the text": text_identity(tokens), "the text of --eval": text_identity(eval_tokens)}
    return found | model_identity(checkpoint)


def _perplexity(job: _Job, checkpoint: Checkpoint, observer: Observer) -> dict[str, Any]:
    return measure_perplexity(checkpoint, job.eval_tokens, observer, job.spec.memory_budget, job.device).to_dict()


def _perplexity_after(job: _Job, directory: Path, observer: Observer) -> dict[str, Any]:
    try:
        return _perplexity(job, open_checkpoint(directory), observer)
    except TsenorError as error:
        if error.code != "overflow":
            raise
        what, remedy = f"training has diverged: {error.message}", "take a smaller --learning-rate"
        raise CheckFailed(what, remedy, code="diverged") from error


def _write(job: _Job, weights: Mapping[str, torch.Tensor], staged: Staged) -> list[TensorRecord]:
    """The shards, as the input's, and all beside them; the records of all tensors as they are now."""
    shards = OutputShards(job.checkpoint, staged.directory)
    records = [_write_tensor(job.checkpoint, record, weights.get(record.name), shards) for record in job.pruned.tensors]
    shards.sync()
    beside = [relative for relative in job.checkpoint.other_files if relative not in WRITTEN_ANEW]
    masks = {mask.path.relative_to(job.checkpoint.directory) for mask in saved_masks(job.checkpoint).values()}
    for relative in (*beside, *sorted(masks)):
        copy_file(job.checkpoint.directory / relative, staged.directory / relative)
    return records


def _write_tensor(
    checkpoint: Checkpoint, record: TensorRecord, weight: torch.Tensor | None, shards: OutputShards
) -> TensorRecord:
    """One tensor, trained or as it was.

    Raises:
        CheckFailed: a weight that its mask drops is not zero.
    """
    tensor, zeros = checkpoint.tensors[record.name], record.zeros
    if weight is not None and record.action == "pruned":
        weight = weight + 0  # what is too small for the dtype becomes a zero, and must not be a negative one
        if count := int(weight[~mask_on_disk(checkpoint, record)].count_nonzero()):
            raise CheckFailed(f"{record.name}: {count:,} weights that the mask drops are not zero", code="mask-broken")
        zeros = weight.numel() - int(weight.count_nonzero())
    with shards.place_of(tensor) as place:
        for part in tensor.chunks() if weight is None else [as_bytes(weight)]:
            place.write(part)
    return replace(record, sha256=place.sha256(), zeros=zeros)


def _report(
    job: _Job,
    records: list[TensorRecord],
    losses: list[float],
    perplexity: dict[str, Any],
    costs: Costs,
) -> Report:
    """The report of the pruning, of masks and their quality, with what is true of the weights now."""
    pruned = job.pruned
    before = pruned.training["pruning"] if pruned.training else None  # it may not be the first time
    training = {
        "source": job.spec.model,
        "pruning": before or {"identity": pruned.identity, "perplexity": pruned.perplexity},
        "options": {name: getattr(job.spec, name) for name in sorted(_OPTIONS)},
        "autocast": "bfloat16" if autocasts(job.device) else None,
        "text": job.tokens.to_dict(),
        "held_out": job.spec.eval_text is None,
        "losses": losses,
    }
    zeros = sum(record.zeros or 0 for record in records)
    return replace(
        pruned,
        identity=identity_sha256(job.identity),
        tsenor_version=__version__,
        versions=_versions(),
        device=device_name(job.device),
        processes=1,
        threads=torch.get_num_threads(),
        summary=replace(pruned.summary, zeros=zeros, **costs.to_dict()),
        tensors=records,
        perplexity=perplexity,
        training=training,
    )


def _verify(directory: Path, observer: Observer) -> None:
    """What `tsenor verify` will say, before there is an output."""
    found = verify_checkpoint(open_checkpoint(directory), None, None, observer)
    if not found.ok:
        first = found.failures[0]
        raise CheckFailed(f"{first.where}: {first.what}", "train with a smaller --learning-rate", code="verify-failed")


def _versions() -> dict[str, str]:
    return versions() | {"accelerate": version("accelerate")}
