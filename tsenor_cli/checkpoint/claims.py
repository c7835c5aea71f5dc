"""What a pruned checkpoint is said to be: by its own report, or by the user's pattern."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsenor_cli.checkpoint.jsonfile import read_object
from tsenor_cli.checkpoint.layouts import LAYOUTS, Layout
from tsenor_cli.checkpoint.plan import make_plan
from tsenor_cli.checkpoint.reader import Checkpoint
from tsenor_cli.checkpoint.writer import REPORT_FILE
from tsenor_cli.errors import CheckFailed, InputRefused, UsageError
from tsenor_cli.specs import UPDATING, NMPattern, PruneSpec


@dataclass(frozen=True)
class PrunedClaim:
    """Of one tensor."""

    pattern: NMPattern
    layout: Layout
    mask_only: bool  # the weights that stay are the original's
    mask_sha256: str | None = None  # of its packed mask, if it is saved


@dataclass(frozen=True)
class Claim:
    """Of a whole checkpoint."""

    tensors: dict[str, PrunedClaim]  # those said to be pruned
    hashes: dict[str, str] = field(default_factory=dict)  # of every tensor's bytes, if the report is to be believed
    trained: bool = False  # after pruning: no weight is the original's

    @property
    def patterns(self) -> list[NMPattern]:
        return list(dict.fromkeys(tensor.pattern for tensor in self.tensors.values()))


def claim_of(checkpoint: Checkpoint, pattern: NMPattern | None) -> Claim:
    """What to check: the report, if there is one; `pattern` replaces the patterns that it names.

    Raises:
        CheckFailed: nothing is claimed, or of no tensor that there is.
        InputRefused: the report is damaged.
    """
    path = checkpoint.directory / REPORT_FILE
    if path.is_file():
        return _claim_of_report(path, pattern)
    if pattern is None:
        raise CheckFailed(
            f"{checkpoint.directory} claims no sparsity: it has no {REPORT_FILE}",
            "say what to check for with --nm N:M",
            code="nothing-to-verify",
        )
    plan = make_plan(checkpoint, PruneSpec(str(checkpoint.directory), Path(), pattern))
    found = {item.tensor.name: PrunedClaim(pattern, item.layout, mask_only=True) for item in plan.pruned if item.layout}
    if not found:
        raise CheckFailed(
            f"{checkpoint.directory} has no tensor that {pattern} fits", "see tsenor inspect", code="nothing-to-verify"
        )
    return Claim(found)


def _claim_of_report(path: Path, pattern: NMPattern | None) -> Claim:
    report = read_object(path)
    try:
        pruned = [record for record in report["tensors"] if record["action"] == "pruned"]
        tensors = {record["name"]: _claim_of_record(record, report, pattern) for record in pruned}
        hashes = {record["name"]: str(record["sha256"]) for record in report["tensors"]}
        return Claim(tensors, hashes if pattern is None else {}, trained=report.get("training") is not None)
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise InputRefused(
            f"{path} is not a report of tsenor ({error})", "remove it and give --nm N:M", code="damaged-report"
        ) from error


def _claim_of_record(record: dict[str, Any], report: dict[str, Any], pattern: NMPattern | None) -> PrunedClaim:
    claimed = NMPattern.parse(record["pattern"], transposable=record["transposable"])
    mask_only = record["method"] not in UPDATING or not report["options"]["update"]
    mask_sha256 = record.get("mask_sha256") if pattern is None else None
    return PrunedClaim(pattern or claimed, LAYOUTS[LAYOUTS.index(record["layout"])], mask_only, mask_sha256)
