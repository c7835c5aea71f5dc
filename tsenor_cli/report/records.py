"""What a run did, as plain data: the schema of tsenor-report.json (see schema.json beside this file)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 6


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the checkpoint. The fields from `zeros` on are set for pruned tensors only."""

    name: str
    file: str
    dtype: str
    shape: list[int]
    parameters: int
    sha256: str  # of its bytes in the output
    prunable: bool  # a weight of a linear map in the model's body: counts in the coverage
    action: str  # "pruned" or "kept"
    reason: str | None = None  # why it was kept
    layout: str | None = None  # how its matrices lie on disk, if that is understood
    pattern: str | None = None  # N:M
    transposable: bool | None = None
    method: str | None = None
    fallbacks: list[str] | None = None  # why parts of it were pruned by magnitude instead
    mask_sha256: str | None = None  # of its packed mask in the output, if masks are saved
    zeros: int | None = None
    energy: float | None = None  # Σ w² of the input
    kept_energy: float | None = None  # Σ w² of the output / energy
    tokens: int | None = None  # seen in calibration; of experts: all of them together
    output_energy: float | None = None  # ‖XWᵀ‖² of the input weights on the calibration text
    mask_error: float | None = None  # ‖X(W - M∘W)ᵀ‖² / ‖XWᵀ‖² on the calibration text, the kept weights unchanged
    error: float | None = None  # the same of the output; unknown without a Gram matrix
    damping: float | None = None  # what was added to the Gram matrix's diagonal, of its mean; the largest, of experts
    damping_retries: int | None = None  # how often the factorisation failed and was repeated with more
    objective: float | None = None  # Σ of the kept scores
    upper_bound: float | None = None  # no mask of this pattern can have a larger objective
    gap: float | None = None  # (upper_bound - objective) / upper_bound
    worst_block_gap: float | None = None
    solver: str | None = None
    status: str | None = None  # how the solver ended: masks.solution.Status
    solver_seconds: float | None = None
    seconds: float | None = None  # in the pruning method, its solver included


@dataclass(frozen=True)
class Summary:
    """The run in a few numbers. Shares are between 0 and 1."""

    coverage: float  # pruned / prunable parameters
    pruned_tensors: int
    pruned_parameters: int
    prunable_parameters: int
    total_parameters: int
    zeros: int
    kept_energy: float
    objective: float
    upper_bound: float
    gap: float
    worst_block_gap: float
    checkpoint_bytes: int  # of the shards; the output's are the same size
    error: float | None  # Σ of the tensors' squared output errors / Σ of their squared outputs, where known
    seconds: float
    stages: dict[str, float]  # what they went to
    peak_memory_bytes: int  # the largest process, imports included
    read_bytes: int | None  # by all processes during the run, from files and caches; None where no system counts
    written_bytes: int | None


@dataclass(frozen=True)
class Tile:
    """A corner of one pruned tensor, to look at: whole tiles of the pattern."""

    tensor: str
    pattern: str  # N:M
    transposable: bool
    weights: list[str]  # the rows of the input, numbers separated by spaces
    kept: list[str]  # the rows of the output, 1 where a weight is not zero


@dataclass(frozen=True)
class Histogram:
    """A sample of the weights of all pruned tensors, each in units of its tensor's standard deviation."""

    tensors: int
    weights: int  # in the sample
    edge: float  # bins of equal width from -edge to edge; what lies beyond is in the outermost ones
    before: list[int]
    after: list[int]  # without the zeros


@dataclass(frozen=True)
class Report:
    """The whole of tsenor-report.json."""

    identity: str  # a hash of everything that decides the bytes of the output: equal for equal runs
    tsenor_version: str
    versions: dict[str, str]
    model: dict[str, Any]  # source, revision, architecture, model_type
    pattern: dict[str, Any] | None  # n, m, transposable: of tensors that no rule of a recipe fits
    options: dict[str, Any]
    citations: dict[str, str]  # of every method that was used
    device: str
    processes: int
    threads: int  # of each process
    summary: Summary
    tensors: list[TensorRecord]
    calibration: dict[str, Any] | None = None  # the text: source, hashes, samples, tokens
    perplexity: dict[str, Any] | None = None  # before and after this run, with the text they were measured on
    tile: Tile | None = None
    histogram: Histogram | None = None
    training: dict[str, Any] | None = None  # what was learned and how, if the checkpoint was fine-tuned
    left_out_files: list[str] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Report:
        """What `to_dict` made, of the same version."""
        parts = {
            "summary": Summary(**facts["summary"]),
            "tensors": [TensorRecord(**record) for record in facts["tensors"]],
            "tile": Tile(**facts["tile"]) if facts["tile"] is not None else None,
            "histogram": Histogram(**facts["histogram"]) if facts["histogram"] is not None else None,
        }
        return cls(**{**facts, **parts})

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
