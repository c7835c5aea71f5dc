"""The map: resolve → open → plan → (read → prune → write, tensor by tensor) → record.

`plan_prune`, `prune` and `verify` are all that the command line and the library call; every room is reached from here.
"""

from __future__ import annotations

import math
import os
import time
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch

from tsenor_cli.checkpoint.layouts import from_matrices, to_matrices
from tsenor_cli.checkpoint.plan import Plan, TensorPlan, enforce, make_plan
from tsenor_cli.checkpoint.reader import open_checkpoint
from tsenor_cli.checkpoint.source import resolve_checkpoint
from tsenor_cli.checkpoint.verifier import Verification, verify_checkpoint
from tsenor_cli.checkpoint.writer import (
    REPORT_FILE,
    check_output,
    check_space,
    copy_file,
    shard_writer,
    staged_output,
    write_text,
)
from tsenor_cli.errors import InputRefused, UsageError
from tsenor_cli.masks.solve import solve_mask
from tsenor_cli.observer import Observer
from tsenor_cli.pruners.base import PrunedLayer, Pruner, SolveMask
from tsenor_cli.pruners.magnitude import Magnitude
from tsenor_cli.report.build import Tally, build_report, kept_record
from tsenor_cli.report.card import CARD_FILE, model_card
from tsenor_cli.report.records import Report, TensorRecord
from tsenor_cli.specs import NMPattern, PruneSpec

_PRUNERS: dict[str, type[Pruner]] = {"magnitude": Magnitude}


def plan_prune(spec: PruneSpec) -> Plan:
    """Decide what would be done to every tensor, from headers alone; nothing is written."""
    _solver(spec)
    return make_plan(open_checkpoint(*resolve_checkpoint(spec.model)), spec)


def prune(spec: PruneSpec, observer: Observer | None = None) -> Report:
    """Prune the checkpoint `spec.model` into `spec.output`, streaming tensors from disk to disk.

    Memory stays bounded by one band of one tensor. The output appears only when it is complete.

    Raises:
        UsageError, InputRefused, CheckFailed, OutputUnavailable, TsenorError: see errors.py; nothing is left behind.
    """
    started, observer = time.perf_counter(), observer or Observer()
    output = Path(os.path.abspath(spec.output))  # noqa: PTH100  (resolve() would follow a link)
    pruner, solver = _pruner(spec), _solver(spec)
    directory, revision = resolve_checkpoint(spec.model)
    check_output(output, directory, overwrite=spec.overwrite)
    checkpoint = open_checkpoint(directory, revision)
    plan = make_plan(checkpoint, spec)
    enforce(plan, spec)
    check_space(output, checkpoint.nbytes)
    observer.planned(plan)
    with staged_output(output) as staging:
        records: list[TensorRecord] = []
        for shard in checkpoint.shards:
            with shard_writer(shard, staging) as file:
                items = [plan.by_name[tensor.name] for tensor in shard.tensors]
                records += [_write_tensor(item, pruner, solver, spec.pattern.m, file, observer) for item in items]
        for relative in checkpoint.other_files:
            copy_file(checkpoint.directory / relative, staging / relative)
        report = build_report(spec, plan, records, pruner.citation, time.perf_counter() - started)
        write_text(staging / CARD_FILE, model_card(checkpoint, spec, report))
        write_text(staging / REPORT_FILE, report.to_json())
    return report


def verify(
    model: str, pattern: NMPattern | None = None, against: str | None = None, observer: Observer | None = None
) -> Verification:
    """Check a pruned checkpoint from its files alone (see verifier.py); failures are in the result.

    Raises:
        CheckFailed: no pattern is given and the checkpoint carries no report that claims one.
        InputRefused: a checkpoint cannot be read.
    """
    original = open_checkpoint(*resolve_checkpoint(against)) if against is not None else None
    checkpoint = open_checkpoint(*resolve_checkpoint(model))
    return verify_checkpoint(checkpoint, pattern, original, (observer or Observer()).advanced)


def _pruner(spec: PruneSpec) -> Pruner:
    if spec.method not in _PRUNERS:
        raise UsageError(f"unknown method {spec.method!r}", f"known: {', '.join(_PRUNERS)}")
    return _PRUNERS[spec.method]()


def _solver(spec: PruneSpec) -> SolveMask:
    """What every pruner is handed to find its masks with."""
    solver = partial(
        solve_mask,
        pattern=spec.pattern,
        solver=spec.solver,
        device=spec.device,
        tau=spec.tau,
        iterations=spec.iterations,
        local_search=spec.local_search,
    )
    solver(torch.empty(0, spec.pattern.m))  # no scores, but options that contradict each other are refused
    return solver


def _write_tensor(
    item: TensorPlan, pruner: Pruner, solver: SolveMask, m: int, file: BinaryIO, observer: Observer
) -> TensorRecord:
    """Stream one tensor into the open shard: band by band through the pruner, or byte for byte."""
    tensor = item.tensor
    if not item.pruned:
        for chunk in tensor.chunks():
            file.write(chunk)
            observer.advanced(tensor.name, len(chunk))
        return kept_record(item)
    tally = Tally()
    for first, last in item.bands(m):
        band = tensor.read(first, last)
        pruned = _prune_band(item, band, pruner, solver, tally)
        file.write(pruned.view(-1).view(torch.uint8).numpy().data)
        observer.advanced(tensor.name, band.nbytes)
    return tally.record(item)


def _prune_band(item: TensorPlan, band: torch.Tensor, pruner: Pruner, solver: SolveMask, tally: Tally) -> torch.Tensor:
    """One band in the tensor's own layout and dtype, pruned."""
    assert item.layout is not None
    if not all(map(math.isfinite, torch.stack(torch.aminmax(band)).tolist())):  # NaN travels through min and max
        raise InputRefused(
            f"{item.tensor.name} has NaN or infinite weights", "the checkpoint is damaged: fetch it again"
        )
    weight = to_matrices(band, item.layout)
    layer: PrunedLayer = pruner.prune(weight, solver)
    tally.add(weight, layer)
    return from_matrices(layer.weight, item.layout).contiguous()
