"""What a run is before it begins: everything that can be refused before a byte is written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tsenor_cli.checkpoint.journal import Identity
from tsenor_cli.checkpoint.parts import part_directory
from tsenor_cli.checkpoint.plan import Plan, enforce, make_plan
from tsenor_cli.checkpoint.reader import Checkpoint, open_checkpoint
from tsenor_cli.checkpoint.remote import open_remote
from tsenor_cli.checkpoint.source import resolve_checkpoint
from tsenor_cli.checkpoint.staging import already_finished, check_output, check_space
from tsenor_cli.device import device_name, find_device
from tsenor_cli.distribution import share_shards
from tsenor_cli.errors import UsageError, budget_too_small
from tsenor_cli.identity import run_identity
from tsenor_cli.pruners.alps import Alps
from tsenor_cli.pruners.base import BoundSolver, Pruner
from tsenor_cli.pruners.magnitude import Magnitude
from tsenor_cli.pruners.sparsegpt import SparseGPT
from tsenor_cli.pruners.wanda import Wanda
from tsenor_cli.report.read import read_report
from tsenor_cli.report.records import Report
from tsenor_cli.specs import CALIBRATED, METHODS, UPDATING, NMPattern, PruneSpec
from tsenor_cli.streaming import leave_nonfinite

if TYPE_CHECKING:
    from tsenor_cli.calibration.tokens import TextTokens


@dataclass(frozen=True)
class Job:
    """A run that has been thought through: what every process of it knows before it begins."""

    spec: PruneSpec
    output: Path
    checkpoint: Checkpoint
    plan: Plan  # of all of it, or of this part
    tokens: TextTokens | None
    eval_tokens: TextTokens | None
    identity: Identity

    @property
    def device(self) -> torch.device:
        """Of this process."""
        return find_device(self.spec.device)


def prepare(spec: PruneSpec, processes: int) -> Job | Report:
    """Everything that can be refused before a byte is written; the report, if all has been done already."""
    output = absolute(spec.output)
    if spec.part is not None:
        output = part_directory(output, spec.part)
    check_methods(spec)
    if spec.stream_input and processes > 1:
        raise UsageError(
            "--no-cache-input is for one process", "make parts with --shard instead of torchrun", code="cannot-stream"
        )
    if spec.device.startswith("cuda:") and processes > 1:
        raise UsageError(
            f"--device {spec.device} is one GPU for {processes} processes", "give cuda: each of them takes its own"
        )
    device = find_device(spec.device)
    solvers_of(spec)
    checkpoint = open_input(spec)
    check_output(output, checkpoint.directory, overwrite=spec.overwrite or spec.resume is True)
    plan = plan_of(checkpoint, spec)
    if spec.allow_nonfinite:
        plan = leave_nonfinite(plan)
    enforce(plan, spec)
    tokens, eval_tokens = _calibration_tokens(spec, plan), _eval_tokens(spec, checkpoint)
    identity = run_identity(spec, plan, device_name(device), tokens, eval_tokens)
    if spec.resume and already_finished(output, identity):
        return read_report(output)
    check_output(output, checkpoint.directory, overwrite=spec.overwrite)
    if spec.part is not None:
        plan = plan.restricted_to(share_shards(plan, [1.0] * spec.part.count)[spec.part.number - 1])
    check_space(output, plan.output_bytes + checkpoint.other_bytes, plan.checkpoint.fetched_bytes)
    return Job(spec, output, checkpoint, plan, tokens, eval_tokens, identity)


def open_input(spec: PruneSpec) -> Checkpoint:
    """The input, its headers checked, and what will be copied known to be readable."""
    if spec.stream_input:
        return open_remote(spec.model)
    checkpoint = open_checkpoint(*resolve_checkpoint(spec.model))
    checkpoint.check_other_files()
    return checkpoint


def plan_of(checkpoint: Checkpoint, spec: PruneSpec) -> Plan:
    """The plan, with what calibration will need of memory, and whether hidden states have to go to disk.

    Raises:
        UsageError: the memory budget is too small even so.
    """
    plan = make_plan(checkpoint, spec)
    if plan.calibrated:
        from tsenor_cli.calibration.memory import expected_memory
        from tsenor_cli.checkpoint.adapter.tokenizer import window_length

        assert spec.calibration is not None
        length = window_length(checkpoint, spec.calibration.sequence_length)
        memory = expected_memory(plan, spec.calibration.samples, length)
        plan = replace(plan, memory=memory)
    if spec.memory_budget is None or plan.peak_bytes <= spec.memory_budget:
        return plan
    spilled = plan.spilled()
    if spilled.peak_bytes > spec.memory_budget:
        raise budget_too_small(spec.memory_budget, spilled.peak_bytes)
    return spilled


def check_methods(spec: PruneSpec) -> None:
    """Methods and the options that belong to them fit together."""
    if spec.part is not None and (spec.methods & CALIBRATED or spec.eval_text is not None):
        raise UsageError(
            "--shard makes a part that knows nothing of the others, and layers that run need all",
            "use torchrun for calibrated methods and --eval",
        )
    if spec.stream_input and (spec.methods & CALIBRATED or spec.eval_text is not None or spec.allow_nonfinite):
        raise UsageError(
            "--no-cache-input reads shards once; calibrated methods, --eval and --allow-nonfinite do so more often",
            "leave it out",
            code="cannot-stream",
        )
    if unknown := spec.methods - set(METHODS):
        raise UsageError(f"unknown method {min(unknown)!r}", f"known: {', '.join(METHODS)}")
    calibrated = sorted(spec.methods & CALIBRATED)
    if calibrated and spec.calibration is None:
        raise UsageError(f"{calibrated[0]} has to see text", "give it with --calibration FILE")
    if not calibrated and spec.calibration is not None:
        raise UsageError(
            "--calibration is given, and no method needs it", "choose one with --method, such as sparsegpt"
        )
    if spec.calibration is not None and spec.calibration.source.startswith("-") and spec.eval_text in {"-", "-:jsonl"}:
        raise UsageError(
            "--calibration and --eval both ask for standard input", "give one of them a file", code="bad-text-source"
        )
    if not spec.update and spec.methods.isdisjoint(UPDATING):
        raise UsageError("--no-update: no method changes weights", f"it is for {' and '.join(sorted(UPDATING))}")
    if spec.damping != PruneSpec.damping and spec.methods.isdisjoint(UPDATING):
        raise UsageError("--damping: no method takes it", f"it is for {' and '.join(sorted(UPDATING))}")


def pruners_of(spec: PruneSpec) -> Mapping[str, Pruner]:
    return {
        "magnitude": Magnitude(),
        "wanda": Wanda(),
        "sparsegpt": SparseGPT(damping=spec.damping, update=spec.update),
        "alps": Alps(damping=spec.damping, update=spec.update),
    }


def solvers_of(spec: PruneSpec) -> Mapping[NMPattern, BoundSolver]:
    """What pruners are handed to find their masks with, for every pattern of the run."""
    patterns = {rule.choice.pattern for rule in spec.rules if rule.choice is not None}
    if spec.pattern is not None:
        patterns.add(spec.pattern)
    options: dict[str, Any] = {"tau": spec.tau, "iterations": spec.iterations, "local_search": spec.local_search}
    device, fallback = str(find_device(spec.device)), spec.fallback
    solvers = {pattern: BoundSolver(pattern, spec.solver, device, fallback=fallback, **options) for pattern in patterns}
    for pattern, solver in solvers.items():
        solver(torch.empty(0, pattern.m))  # no scores, but options that contradict each other are refused
    return solvers


def _calibration_tokens(spec: PruneSpec, plan: Plan) -> TextTokens | None:
    """The tokens that calibrated methods see, if any tensor gets one."""
    if not plan.calibrated:
        return None
    from tsenor_cli.calibration.tokens import calibration_windows
    from tsenor_cli.checkpoint.adapter.tokenizer import CheckpointTokenizer, window_length

    wanted = spec.calibration
    assert wanted is not None, "check_methods has seen to that"
    tokenizer = CheckpointTokenizer(plan.checkpoint.directory)
    length = window_length(plan.checkpoint, wanted.sequence_length)
    return calibration_windows(
        wanted.source, tokenizer, samples=wanted.samples, length=length, seed=wanted.seed, field=wanted.field
    )


def _eval_tokens(spec: PruneSpec, checkpoint: Checkpoint) -> TextTokens | None:
    """The text to measure perplexity on before and after, in windows like those of the calibration."""
    if spec.eval_text is None:
        return None
    field, length = spec.eval_windows
    return text_tokens([checkpoint], spec.eval_text, field, length)


def text_tokens(
    checkpoints: Sequence[Checkpoint], text: str, field: str, sequence_length: int | None, limit: int | None = None
) -> TextTokens:
    """The windows of a text that the perplexity of checkpoints is measured on, as long as the first of them says."""
    from tsenor_cli.calibration.tokens import all_windows
    from tsenor_cli.checkpoint.adapter.tokenizer import CommonTokenizer, window_length

    length = window_length(checkpoints[0], sequence_length)
    tokenizer = CommonTokenizer([checkpoint.directory for checkpoint in checkpoints])
    return all_windows(text, tokenizer, length=length, limit=limit, field=field)


def absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  (resolve() would follow a link)
