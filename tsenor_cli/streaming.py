"""Tensor by tensor, band by band: what needs no calibration, and what is only copied."""

from __future__ import annotations

import math
import time

import torch

from tsenor_cli.checkpoint.layouts import from_matrices, to_matrices
from tsenor_cli.checkpoint.plan import TensorPlan, bands
from tsenor_cli.checkpoint.writer import OutputShards
from tsenor_cli.errors import InputRefused
from tsenor_cli.observer import Observer
from tsenor_cli.pruners.base import Pruner, SolveMask
from tsenor_cli.report.build import Tally, kept_record
from tsenor_cli.report.records import TensorRecord


def copy_tensor(item: TensorPlan, shards: OutputShards, observer: Observer) -> TensorRecord:
    """Byte for byte."""
    with shards.place_of(item.tensor) as file:
        for chunk in item.tensor.chunks():
            file.write(chunk)
            observer.advanced(item.tensor.name, len(chunk))
    return kept_record(item)


def prune_bands(
    item: TensorPlan, pruner: Pruner, solver: SolveMask, shards: OutputShards, observer: Observer
) -> TensorRecord:
    """Prune a tensor a few MiB at a time, by a method that can."""
    assert item.layout is not None
    assert item.choice is not None
    tally = Tally()
    with shards.place_of(item.tensor) as file:
        for first, last in bands(item.tensor, item.layout, item.choice.pattern.m):
            band = item.tensor.read(first, last)
            check_finite(item, band)
            weight = to_matrices(band, item.layout)
            started = time.perf_counter()
            layer = pruner.prune(weight, solver)
            tally.add(weight, layer, time.perf_counter() - started)
            pruned = from_matrices(layer.weight, item.layout).contiguous()
            file.write(pruned.view(-1).view(torch.uint8).numpy().data)
            observer.advanced(item.tensor.name, band.nbytes)
    return tally.record(item)


def check_finite(item: TensorPlan, weight: torch.Tensor) -> None:
    """Refuse NaN and infinity, which cannot be ranked."""
    if not all(map(math.isfinite, torch.stack(torch.aminmax(weight)).tolist())):  # NaN travels through min and max
        raise InputRefused(
            f"{item.tensor.name} has NaN or infinite weights", "the checkpoint is damaged: fetch it again"
        )
