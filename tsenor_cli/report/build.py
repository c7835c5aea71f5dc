"""From what happened to the records of the report."""

from __future__ import annotations

import math
import platform
import resource
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tsenor_cli import __version__
from tsenor_cli.checkpoint.plan import Plan, TensorPlan
from tsenor_cli.masks.apply import count_zeros
from tsenor_cli.masks.solution import Status
from tsenor_cli.pruners.base import PrunedLayer
from tsenor_cli.report.records import Report, Summary, TensorRecord
from tsenor_cli.specs import PruneSpec

_PACKAGES = ("torch", "transformers", "safetensors", "huggingface_hub", "numba", "numpy")


@dataclass
class Tally:
    """Sums over the bands of one tensor."""

    zeros: int = 0
    energy: float = 0.0
    kept_energy: float = 0.0
    objective: float = 0.0
    upper_bound: float = 0.0
    worst_block_gap: float = 0.0
    seconds: float = 0.0
    solver: str = ""
    stopped: bool = False  # a band's solver ran out of iterations

    def add(self, weight: torch.Tensor, layer: PrunedLayer) -> None:
        solution = layer.solution
        self.zeros += count_zeros(layer.weight)
        self.energy += energy(weight)
        self.kept_energy += energy(layer.weight)
        self.objective += solution.objective
        self.upper_bound += solution.upper_bound
        self.worst_block_gap = max(self.worst_block_gap, solution.worst_block_gap)
        self.seconds += solution.seconds
        self.solver = solution.solver
        self.stopped |= solution.status is Status.MAX_ITERATIONS

    def record(self, item: TensorPlan) -> TensorRecord:
        return TensorRecord(
            **_facts(item),
            action="pruned",
            zeros=self.zeros,
            energy=self.energy,
            kept_energy=_share(self.kept_energy, self.energy),
            objective=self.objective,
            upper_bound=self.upper_bound,
            gap=_gap(self.objective, self.upper_bound),
            worst_block_gap=self.worst_block_gap,
            solver=self.solver,
            status=(Status.MAX_ITERATIONS if self.stopped else Status.CONVERGED).label,
            seconds=round(self.seconds, 6),
        )


def kept_record(item: TensorPlan) -> TensorRecord:
    """The record of a tensor that was copied."""
    return TensorRecord(**_facts(item), action="kept", reason=item.reason)


def energy(weight: torch.Tensor) -> float:
    """Σ w², in float64: nothing overflows, and no float64 copy of the weight is made."""
    return float(torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float64).square().sum())


def build_report(spec: PruneSpec, plan: Plan, records: list[TensorRecord], citation: str, seconds: float) -> Report:
    """Gather the whole report of a finished run."""
    checkpoint = plan.checkpoint
    return Report(
        tsenor_version=__version__,
        versions={"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        model={
            "source": spec.model,
            "revision": checkpoint.revision,
            "architecture": next(iter(checkpoint.config.get("architectures") or []), None),
            "model_type": checkpoint.config.get("model_type"),
        },
        pattern={"n": spec.pattern.n, "m": spec.pattern.m, "transposable": spec.pattern.transposable},
        options={
            "method": spec.method,
            "solver": spec.solver,
            "tau": spec.tau,
            "iterations": spec.iterations,
            "local_search": spec.local_search,
            "only": list(spec.only),
            "ignore": list(spec.ignore),
            "min_coverage": spec.min_coverage,
            "strict": spec.strict,
            "device": spec.device,
        },
        citation=citation,
        device="cpu",
        threads=torch.get_num_threads(),
        summary=_summarise(plan, records, seconds),
        tensors=records,
        left_out_files=[str(path) for path in checkpoint.left_out_files],
    )


def _summarise(plan: Plan, records: list[TensorRecord], seconds: float) -> Summary:
    pruned = [record for record in records if record.action == "pruned"]
    energy_before, energy_after = _total(pruned, "energy"), math.fsum(r.energy * r.kept_energy for r in pruned)  # type: ignore[operator]
    objective, upper_bound = _total(pruned, "objective"), _total(pruned, "upper_bound")
    nbytes = plan.checkpoint.nbytes
    return Summary(
        coverage=plan.coverage,
        pruned_tensors=len(pruned),
        pruned_parameters=plan.pruned_parameters,
        prunable_parameters=plan.prunable_parameters,
        total_parameters=sum(record.parameters for record in records),
        zeros=sum(record.zeros or 0 for record in pruned),
        kept_energy=_share(energy_after, energy_before),
        objective=objective,
        upper_bound=upper_bound,
        gap=_gap(objective, upper_bound),
        worst_block_gap=max((record.worst_block_gap or 0.0 for record in pruned), default=0.0),
        checkpoint_bytes=nbytes,
        seconds=round(seconds, 3),
        peak_memory_bytes=peak_memory_bytes(),
    )


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent held before exec, too
        return next(
            int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM:")
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def _facts(item: TensorPlan) -> dict[str, Any]:
    tensor = item.tensor
    return {
        "name": tensor.name,
        "file": tensor.path.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "parameters": tensor.parameters,
        "prunable": item.prunable,
        "layout": item.layout,
    }


def _total(records: list[TensorRecord], field: str) -> float:
    return math.fsum(getattr(record, field) for record in records)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _gap(objective: float, upper_bound: float) -> float:
    return (upper_bound - objective) / upper_bound if upper_bound else 0.0
