"""What will be done to each tensor and why, decided from headers alone before a byte is written."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tsenor_cli.checkpoint.layouts import Layout, band_step, matrix_size
from tsenor_cli.checkpoint.reader import PRUNABLE_DTYPES, Checkpoint, DiskTensor
from tsenor_cli.errors import CheckFailed, InputRefused, UsageError
from tsenor_cli.specs import NMPattern, PruneSpec

if TYPE_CHECKING:
    from tsenor_cli.checkpoint.layers import Role

BAND_BYTES = 4 * 2**20
# Expected peak above the imports, docs/measured.md: float32 scores, mask and results of a band, per element; and what
# is there once: the kernels' code, the meta model, buffers.
_BYTES_PER_ELEMENT, _FIXED_BYTES = 16, 192 * 2**20


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the checkpoint: pruned, or kept for `reason`."""

    tensor: DiskTensor
    reason: str | None
    layout: Layout | None = None  # set when the tensor could be pruned, whether it is or not
    prunable: bool = True  # counts in the coverage

    @property
    def pruned(self) -> bool:
        return self.reason is None

    def bands(self, m: int) -> list[tuple[int, int]]:
        """Ranges of the leading axis, each whole in groups and tiles and at most about BAND_BYTES."""
        assert self.layout is not None
        rows, step = self.tensor.shape[0], band_step(self.layout, m)
        row_bytes = self.tensor.nbytes // rows
        band = max(BAND_BYTES // row_bytes // step, 1) * step
        return [(first, min(first + band, rows)) for first in range(0, rows, band)]


@dataclass(frozen=True)
class Plan:
    """The fate of every tensor, in the order of the files."""

    checkpoint: Checkpoint
    pattern: NMPattern
    tensors: tuple[TensorPlan, ...]
    by_name: dict[str, TensorPlan] = field(repr=False)

    @property
    def pruned(self) -> list[TensorPlan]:
        return [item for item in self.tensors if item.pruned]

    @property
    def pruned_parameters(self) -> int:
        return sum(item.tensor.parameters for item in self.pruned)

    @property
    def prunable_parameters(self) -> int:
        return sum(item.tensor.parameters for item in self.tensors if item.prunable)

    @property
    def coverage(self) -> float:
        """Pruned share of the parameters that could be pruned in principle, 0 to 1."""
        return self.pruned_parameters / max(self.prunable_parameters, 1)

    @property
    def peak_bytes(self) -> int:
        """Expected peak memory above the imports: one band in work."""
        elements = max((_largest_band(item, self.pattern.m) for item in self.pruned), default=0)
        return _FIXED_BYTES + elements * _BYTES_PER_ELEMENT


def make_plan(checkpoint: Checkpoint, spec: PruneSpec) -> Plan:
    """Decide for every tensor; nothing is enforced yet (see `enforce`)."""
    from tsenor_cli.checkpoint.layers import read_roles  # transformers takes seconds; verify can do without

    roles = read_roles(checkpoint)
    tensors = tuple(
        _plan_tensor(tensor, roles[tensor.name], spec) for shard in checkpoint.shards for tensor in shard.tensors
    )
    _check_selection(spec, tensors)
    return Plan(checkpoint, spec.pattern, tensors, {item.tensor.name: item for item in tensors})


def enforce(plan: Plan, spec: PruneSpec) -> None:
    """Stop before anything is written when the plan falls short of what was asked.

    Raises:
        CheckFailed: coverage below `min_coverage`, a tensor that M does not divide under `strict`, or nothing to prune.
    """
    skipped = [item for item in plan.tensors if item.reason and item.reason.startswith(_INDIVISIBLE)]
    if spec.strict and skipped:
        first, more = skipped[0], f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        raise CheckFailed(
            f"--strict: {spec.pattern} does not fit {first.tensor.name} {list(first.tensor.shape)}{more}",
            "choose another M, or leave them out with --ignore",
        )
    if not plan.pruned:
        raise CheckFailed("nothing to prune: no tensor is both prunable and selected", "see the reasons with --dry-run")
    if plan.coverage < spec.min_coverage:
        raise CheckFailed(
            f"coverage {plan.coverage:.4f} is below --min-coverage {spec.min_coverage:g}",
            "see what is skipped and why with --dry-run",
        )


def matches(name: str, pattern: str) -> bool:
    """Whether a tensor name fits a user's pattern: `re:REGEX` (searched), or a glob over the whole name or module."""
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise UsageError(f"{pattern!r} is not a regular expression ({error})", "see Python's re module") from error
    module = name.removesuffix(".weight")
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(module, pattern)


_INDIVISIBLE = "M does not divide"


def _plan_tensor(tensor: DiskTensor, role: Role, spec: PruneSpec) -> TensorPlan:
    if role.layout is None:
        return TensorPlan(tensor, role.reason, None, role.prunable)
    if tensor.dtype not in PRUNABLE_DTYPES:
        raise InputRefused(
            f"{tensor.name} is stored as {tensor.dtype}: the checkpoint is quantised or packed",
            "prune the original floating-point checkpoint",
        )
    return TensorPlan(tensor, _reason_to_keep(tensor, role, spec), role.layout)


def _reason_to_keep(tensor: DiskTensor, role: Role, spec: PruneSpec) -> str | None:
    """Why a prunable tensor is not pruned this time."""
    assert role.layout is not None
    if spec.only and not any(matches(tensor.name, pattern) for pattern in spec.only):
        return "not selected by --only"
    if any(matches(tensor.name, pattern) for pattern in spec.ignore):
        return "ignored"
    out, inputs = matrix_size(tensor.shape, role.layout)
    if tensor.parameters == 0:
        return "empty"
    if not spec.pattern.divides(out, inputs):
        return f"{_INDIVISIBLE}: {spec.pattern.m} and out {out}, in {inputs}"
    if spec.pattern.transposable and any(piece % spec.pattern.m for piece in role.out_pieces):
        return f"{_INDIVISIBLE}: {spec.pattern.m} and the joined outputs {list(role.out_pieces)}"
    if spec.pattern.transposable and role.rows_move:
        return "its rows are reordered on loading: only --standard patterns survive that"
    return None


def _check_selection(spec: PruneSpec, tensors: tuple[TensorPlan, ...]) -> None:
    """A selection that selects nothing is a typing error, not a wish."""
    for option, patterns in (("--only", spec.only), ("--ignore", spec.ignore)):
        for pattern in patterns:
            if not any(matches(item.tensor.name, pattern) for item in tensors):
                raise UsageError(f"{option} {pattern!r} fits no tensor", "list the names with tsenor inspect")


def _largest_band(item: TensorPlan, m: int) -> int:
    first, last = item.bands(m)[0]
    return (last - first) * (item.tensor.parameters // item.tensor.shape[0])
