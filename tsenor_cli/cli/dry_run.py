"""What `tsenor prune --dry-run` says: every tensor, and how long it would take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tsenor_cli.cli import console
from tsenor_cli.report.words import duration, size

if TYPE_CHECKING:
    from tsenor_cli.checkpoint.plan import Plan, TensorPlan
    from tsenor_cli.forecast import Forecast


def plan_json(plan: Plan, prediction: Forecast) -> dict[str, Any]:
    """For programs."""
    return {
        "schema_version": 3,
        "coverage": plan.coverage,
        "pruned_parameters": plan.pruned_parameters,
        "prunable_parameters": plan.prunable_parameters,
        "bytes": plan.checkpoint.nbytes,
        "expected_peak_memory_bytes": plan.peak_bytes,
        "memory": plan.memory,
        "forecast": prediction.to_dict(),
        "tensors": [
            {
                "name": item.tensor.name,
                "file": item.tensor.path.name,
                "dtype": item.tensor.dtype,
                "shape": list(item.tensor.shape),
                "bytes": item.tensor.nbytes,
                "prunable": item.prunable,
                "layout": item.layout,
                "pattern": str(item.choice.pattern) if item.pruned and item.choice else None,
                "transposable": item.choice.pattern.transposable if item.pruned and item.choice else None,
                "method": item.choice.method if item.pruned and item.choice else None,
                "action": "prune" if item.pruned else "keep",
                "reason": item.reason,
            }
            for item in plan.tensors
        ],
    }


def show_plan(plan: Plan, prediction: Forecast) -> None:
    """For people, on stdout: it is what they asked for."""
    rows = [
        (
            item.tensor.name,
            item.tensor.dtype,
            str(list(item.tensor.shape)),
            item.layout or "",
            size(item.tensor.nbytes),
            _action(item),
        )
        for item in plan.tensors
    ]
    console.table(("tensor", "dtype", "shape", "layout", "bytes", "action"), rows, to_stdout=True)
    console.emit(
        f"{len(plan.pruned)} of {len(plan.tensors)} tensors to prune, "
        f"coverage {plan.coverage:.2%}, {size(plan.output_bytes)} to write, "
        f"peak memory about {size(plan.peak_bytes)} above the imports"
    )
    console.emit(_in_words(prediction))


def _in_words(prediction: Forecast) -> str:
    """One line: how long, what of, and how far that is to be trusted."""
    by = "" if prediction.processes == 1 else f" by {prediction.processes} processes on {prediction.machines} machines"
    if prediction.processes > 1:
        by += f", balance {prediction.balance:.1%}"
    network = f", {size(prediction.network_bytes)} between them" if prediction.network_bytes else ""
    return (
        f"about {duration(prediction.seconds)}{by}, {size(prediction.read_bytes)} to read, "
        f"{size(prediction.written_bytes)} to write{network} ({prediction.rates.where})"
    )


def _action(item: TensorPlan) -> str:
    if not item.pruned or item.choice is None:
        return f"keep: {item.reason}"
    return f"{item.choice.pattern} {item.choice.pattern.kind}, {item.choice.method}"
