"""What a report says as single numbers with names, and conditions on them: perplexity_ratio>1.05.

Imports nothing heavy, so that a condition can be refused before a run begins.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tsenor_cli.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from tsenor_cli.report.records import Report

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def _perplexity(report: Report, key: str) -> float | None:
    return None if report.perplexity is None else float(report.perplexity[key]["perplexity"])


def _ratio(report: Report) -> float | None:
    before, after = (_perplexity(report, key) for key in ("before", "after"))
    return None if before is None or after is None else after / before


METRICS: dict[str, Callable[[Report], float | None]] = {
    "coverage": lambda report: report.summary.coverage,
    "kept_energy": lambda report: report.summary.kept_energy,
    "error": lambda report: report.summary.error,
    "perplexity": lambda report: _perplexity(report, "after"),
    "perplexity_before": lambda report: _perplexity(report, "before"),
    "perplexity_ratio": _ratio,  # after / before
    "gap": lambda report: report.summary.gap,
    "worst_block_gap": lambda report: report.summary.worst_block_gap,
    "pruned_tensors": lambda report: report.summary.pruned_tensors,
    "skipped_tensors": lambda report: sum(r.prunable and r.action == "kept" for r in report.tensors),
    "seconds": lambda report: report.summary.seconds,
    "peak_memory_bytes": lambda report: report.summary.peak_memory_bytes,
}


@dataclass(frozen=True)
class Condition:
    """A bound on a number of the report."""

    metric: str  # one of METRICS
    comparison: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read "perplexity_ratio>1.05".

        Raises:
            UsageError: it is none.
        """
        match = re.fullmatch(r"\s*([a-z_]+)\s*(<=|>=|<|>)\s*([0-9]+(?:\.[0-9]+)?(?:e-?[0-9]{1,2})?)\s*", text)
        if match is None or match[1] not in METRICS:
            raise UsageError(
                f"{text!r} is not a condition",
                f"give one such as 'perplexity_ratio>1.05'; known are {', '.join(METRICS)}",
                code="bad-condition",
            )
        return cls(match[1], match[2], float(match[3]))

    @property
    def needs_text(self) -> bool:
        """Whether the number is there only if perplexity was measured."""
        return self.metric.startswith("perplexity")

    @property
    def needs_gram(self) -> bool:
        """Whether the number is there only if a method has seen what its weights do to their inputs."""
        return self.metric == "error"

    def holds(self, report: Report, where: str) -> bool:
        """Whether it is so; raises CheckFailed if the report, that of `where`, does not have the number."""
        value = METRICS[self.metric](report)
        if value is None:
            raise CheckFailed(
                f"{where}: the report has no {self.metric} to hold against {self}",
                "prune with --eval TEXT" if self.needs_text else "prune with --method sparsegpt or alps",
                code="fail-if",
            )
        return _COMPARISONS[self.comparison](value, self.bound)

    def __str__(self) -> str:
        return f"{self.metric}{self.comparison}{self.bound:g}"


def fail_if(conditions: Iterable[Condition], report: Report, where: str) -> None:
    """Raise CheckFailed for the first condition that holds."""
    for condition in conditions:
        if condition.holds(report, where):
            value = METRICS[condition.metric](report)
            raise CheckFailed(f"{where}: {condition.metric} is {value:.6g}, failing on {condition}", code="fail-if")
