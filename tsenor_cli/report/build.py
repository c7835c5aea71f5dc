"""From what happened to the records of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tsenor_cli import __version__
from tsenor_cli.checkpoint.journal import Identity
from tsenor_cli.checkpoint.plan import Plan, TensorPlan
from tsenor_cli.checkpoint.staging import identity_sha256
from tsenor_cli.masks.apply import count_zeros, energy
from tsenor_cli.masks.solution import Status
from tsenor_cli.pruners.base import Calibrated, PrunedLayer
from tsenor_cli.report.costs import Costs
from tsenor_cli.report.records import Histogram, Report, Summary, TensorRecord, Tile
from tsenor_cli.specs import PruneSpec, Rule
from tsenor_cli.versions import versions


@dataclass
class Tally:
    """Sums over the parts of one tensor: its bands, or its experts."""

    zeros: int = 0
    energy: float = 0.0
    kept_energy: float = 0.0
    objective: float = 0.0
    upper_bound: float = 0.0
    worst_block_gap: float = 0.0
    solver_seconds: float = 0.0
    seconds: float = 0.0
    solver: str = ""
    stopped: bool = False  # a part's solver ran out of iterations
    calibrations: list[Calibrated] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)

    def add(self, weight: torch.Tensor, layer: PrunedLayer, seconds: float, fallback: str | None = None) -> None:
        """Add one part: what it was, what became of it, and why it got another method than the chosen one."""
        solution = layer.solution
        self.zeros += count_zeros(layer.weight)
        self.energy += energy(weight)
        self.kept_energy += energy(layer.weight)
        self.objective += solution.objective
        self.upper_bound += solution.upper_bound
        self.worst_block_gap = max(self.worst_block_gap, solution.worst_block_gap)
        self.solver_seconds += solution.seconds
        self.seconds += seconds
        self.solver = solution.solver
        self.stopped |= solution.status is Status.MAX_ITERATIONS
        if layer.calibrated is not None:
            self.calibrations.append(layer.calibrated)
        if fallback is not None:
            self.fallbacks.append(fallback)

    def merge(self, part: Tally) -> None:
        """Add the sums over a part."""
        for name in ("zeros", "energy", "kept_energy", "objective", "upper_bound", "solver_seconds", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(part, name))
        self.worst_block_gap = max(self.worst_block_gap, part.worst_block_gap)
        self.solver = part.solver
        self.stopped |= part.stopped
        self.calibrations += part.calibrations
        self.fallbacks += part.fallbacks

    def record(self, item: TensorPlan, sha256: str, mask_sha256: str | None) -> TensorRecord:
        assert item.choice is not None
        return TensorRecord(
            **_facts(item, sha256),
            action="pruned",
            pattern=str(item.choice.pattern),
            transposable=item.choice.pattern.transposable,
            method=item.choice.method,
            fallbacks=self.fallbacks or None,
            mask_sha256=mask_sha256,
            zeros=self.zeros,
            energy=self.energy,
            kept_energy=_share(self.kept_energy, self.energy),
            objective=self.objective,
            upper_bound=self.upper_bound,
            gap=_gap(self.objective, self.upper_bound),
            worst_block_gap=self.worst_block_gap,
            solver=self.solver,
            status=(Status.MAX_ITERATIONS if self.stopped else Status.CONVERGED).label,
            solver_seconds=round(self.solver_seconds, 6),
            seconds=round(self.seconds, 6),
            **_calibration_facts(self.calibrations),
        )


def _calibration_facts(parts: list[Calibrated]) -> dict[str, Any]:
    """What calibration says of a tensor: of its experts together, if it has several."""
    if not parts:
        return {}
    facts: dict[str, Any] = {"tokens": sum(part.tokens for part in parts)}
    outputs = [part.output_energy for part in parts if part.output_energy is not None]
    if len(outputs) == len(parts):
        total = math.fsum(outputs)
        facts |= {
            "output_energy": total,
            "mask_error": _part(math.fsum(part.mask_loss for part in parts if part.mask_loss is not None), total),
            "error": _part(math.fsum(part.loss for part in parts if part.loss is not None), total),
            "damping": max((part.damping for part in parts if part.damping is not None), default=None),
            "damping_retries": sum(part.damping_retries for part in parts),
        }
    return facts


def kept_record(item: TensorPlan, sha256: str) -> TensorRecord:
    """The record of a tensor that was copied."""
    return TensorRecord(**_facts(item, sha256), action="kept", reason=item.reason)


def build_report(
    spec: PruneSpec,
    identity: Identity,
    plan: Plan,
    records: list[TensorRecord],
    citations: dict[str, str],
    costs: Costs,
    device: str,
    calibration: dict[str, Any] | None,
    perplexity: dict[str, Any] | None,
    tile: Tile | None,
    histogram: Histogram | None,
) -> Report:
    """Gather the whole report of a finished run."""
    checkpoint, pattern = plan.checkpoint, spec.pattern
    return Report(
        identity=identity_sha256(identity),
        tsenor_version=__version__,
        versions=versions(),
        model={
            "source": spec.model,
            "revision": checkpoint.revision,
            "architecture": next(iter(checkpoint.config.get("architectures") or []), None),
            "model_type": checkpoint.config.get("model_type"),
        },
        pattern=asdict(pattern) if pattern is not None else None,
        options={
            **deciding_options(spec),
            "calibration": asdict(spec.calibration) if spec.calibration is not None else None,
            "eval": _eval(spec),
            "memory_budget": spec.memory_budget,
            "device": spec.device,
        },
        citations={name: citations[name] for name in sorted({r.method for r in records if r.method is not None})},
        device=device,
        processes=costs.processes,
        threads=torch.get_num_threads(),
        summary=summarise(records, checkpoint_bytes=plan.checkpoint.nbytes, **costs.to_dict()),
        tensors=records,
        calibration=calibration,
        perplexity=perplexity,
        tile=tile,
        histogram=histogram,
        left_out_files=[str(path) for path in checkpoint.left_out_files],
    )


def deciding_options(spec: PruneSpec) -> dict[str, Any]:
    """The options that can change the bytes of the output, but for pattern and texts."""
    return {
        "method": spec.method,
        "rules": [_rule(rule) for rule in spec.rules],
        "solver": spec.solver,
        "tau": spec.tau,
        "iterations": spec.iterations,
        "local_search": spec.local_search,
        "update": spec.update,
        "damping": spec.damping,
        "few_tokens": spec.few_tokens,
        "only": list(spec.only),
        "ignore": list(spec.ignore),
        "min_coverage": spec.min_coverage,
        "strict": spec.strict,
        "fallback": spec.fallback,
        "allow_nonfinite": spec.allow_nonfinite,
        "save_masks": spec.save_masks,
    }


def _eval(spec: PruneSpec) -> dict[str, Any] | None:
    if spec.eval_text is None:
        return None
    field, length = spec.eval_windows
    return {"source": spec.eval_text, "field": field, "sequence_length": length}


def _rule(rule: Rule) -> dict[str, Any]:
    """A rule as a recipe would say it."""
    if rule.choice is None:
        return {"match": list(rule.match), "skip": True}
    pattern = rule.choice.pattern
    return {"match": list(rule.match), "nm": str(pattern), "kind": pattern.kind, "method": rule.choice.method}


def summarise(records: Sequence[TensorRecord], **costs: Any) -> Summary:  # noqa: ANN401  (the rest of its fields)
    """What the records of a run come to, and what it has cost."""
    pruned = [record for record in records if record.action == "pruned"]
    energy_before, energy_after = _total(pruned, "energy"), math.fsum(r.energy * r.kept_energy for r in pruned)  # type: ignore[operator]
    objective, upper_bound = _total(pruned, "objective"), _total(pruned, "upper_bound")
    pruned_parameters = sum(record.parameters for record in pruned)
    prunable_parameters = sum(record.parameters for record in records if record.prunable)
    return Summary(
        coverage=pruned_parameters / max(prunable_parameters, 1),
        pruned_tensors=len(pruned),
        pruned_parameters=pruned_parameters,
        prunable_parameters=prunable_parameters,
        total_parameters=sum(record.parameters for record in records),
        zeros=sum(record.zeros or 0 for record in pruned),
        kept_energy=_share(energy_after, energy_before),
        objective=objective,
        upper_bound=upper_bound,
        gap=_gap(objective, upper_bound),
        worst_block_gap=max((record.worst_block_gap or 0.0 for record in pruned), default=0.0),
        error=_error(pruned),
        **costs,
    )


def _error(records: list[TensorRecord]) -> float | None:
    """The relative output error of all tensors together whose own is known."""
    known = [(r.error, r.output_energy) for r in records if r.error is not None and r.output_energy is not None]
    return _part(math.fsum(a * b for a, b in known), math.fsum(b for _, b in known)) if known else None


def _facts(item: TensorPlan, sha256: str) -> dict[str, Any]:
    tensor = item.tensor
    return {
        "name": tensor.name,
        "file": tensor.path.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "parameters": tensor.parameters,
        "sha256": sha256,
        "prunable": item.prunable,
        "layout": item.layout,
    }


def _total(records: list[TensorRecord], field: str) -> float:
    return math.fsum(getattr(record, field) for record in records)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _part(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _gap(objective: float, upper_bound: float) -> float:
    return (upper_bound - objective) / upper_bound if upper_bound else 0.0
