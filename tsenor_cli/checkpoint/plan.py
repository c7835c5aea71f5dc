"""What will be done to each tensor and why, decided from headers alone before a byte is written."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from tsenor_cli.checkpoint.layouts import Layout, band_step, matrix_size
from tsenor_cli.checkpoint.maskfile import mask_file
from tsenor_cli.checkpoint.reader import Checkpoint
from tsenor_cli.checkpoint.shard import PRUNABLE_DTYPES, DiskTensor, Shard
from tsenor_cli.checkpoint.site import Site
from tsenor_cli.errors import CheckFailed, InputRefused, UsageError
from tsenor_cli.specs import CALIBRATED, Choice, NMPattern, PruneSpec, matches

if TYPE_CHECKING:
    from tsenor_cli.checkpoint.adapter.roles import Role

HIDDEN_STATES = "hidden states"
BAND_BYTES = 4 * 2**20
# Expected peak above the imports, docs/measured.md: the bands that are read, pruned and written at a time, per element
# of one; and what is there once: the kernels' code, the meta model, buffers.
_BYTES_PER_ELEMENT, FIXED_BYTES = 32, 224 * 2**20


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the checkpoint: pruned, or kept for `reason`."""

    tensor: DiskTensor
    reason: str | None
    layout: Layout | None = None  # set when the tensor could be pruned, whether it is or not
    prunable: bool = True  # counts in the coverage
    choice: Choice | None = None  # what is done, or would be done if nothing stood in the way
    site: Site | None = None  # where its input can be seen
    layer: int | None = None  # its decoder layer

    @property
    def pruned(self) -> bool:
        return self.reason is None

    @property
    def calibrated(self) -> bool:
        """Whether it is pruned by a method that has to see inputs."""
        return self.pruned and self.choice is not None and self.choice.method in CALIBRATED


def bands(tensor: DiskTensor, layout: Layout, m: int, nbytes: int | None = None) -> list[tuple[int, int]]:
    """Ranges of the leading axis, each whole in groups and tiles and at most about `nbytes`, or BAND_BYTES."""
    rows, step = tensor.shape[0], band_step(layout, m)
    row_bytes = tensor.nbytes // rows
    band = max((nbytes or BAND_BYTES) // row_bytes // step, 1) * step
    return [(first, min(first + band, rows)) for first in range(0, rows, band)]


@dataclass(frozen=True)
class Plan:
    """The fate of every tensor, in the order of the files."""

    checkpoint: Checkpoint
    tensors: tuple[TensorPlan, ...]
    memory: dict[str, int]  # the most that is held at once above the imports, in bytes by what it is for
    spills: bool = False  # hidden states go to disk
    saves_masks: bool = False

    @cached_property
    def by_name(self) -> dict[str, TensorPlan]:
        return {item.tensor.name: item for item in self.tensors}

    @property
    def pruned(self) -> list[TensorPlan]:
        return [item for item in self.tensors if item.pruned]

    @cached_property
    def masks(self) -> tuple[Shard, ...]:
        """The files that masks are saved to, none if they are not."""
        pruned = [item.tensor for item in self.pruned] if self.saves_masks else []
        return tuple(mask_file(list(tensors)) for _, tensors in groupby(pruned, attrgetter("path")))

    @property
    def output_bytes(self) -> int:
        """Of the shards and the masks."""
        return self.checkpoint.nbytes + sum(file.nbytes for file in self.masks)

    @property
    def calibrated(self) -> bool:
        return any(item.calibrated for item in self.tensors)

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
        """Expected peak memory above the imports."""
        return sum(self.memory.values())

    def restricted_to(self, shards: Collection[Path]) -> Plan:
        """The same of some shards only."""
        kept = tuple(shard for shard in self.checkpoint.shards if shard.path in shards)
        items = tuple(item for item in self.tensors if item.tensor.path in shards)
        return replace(self, checkpoint=replace(self.checkpoint, shards=kept), tensors=items)

    def spilled(self) -> Plan:
        """The same, with hidden states on disk."""
        return replace(self, memory={**self.memory, HIDDEN_STATES: 0}, spills=True)


def make_plan(checkpoint: Checkpoint, spec: PruneSpec) -> Plan:
    """Decide for every tensor; nothing is enforced yet (see `enforce`)."""
    from tsenor_cli.checkpoint.adapter.roles import read_roles  # transformers takes seconds; verify can do without

    roles = read_roles(checkpoint, layered=not spec.methods.isdisjoint(CALIBRATED))
    tensors = tuple(
        _plan_tensor(tensor, roles[tensor.name], spec) for shard in checkpoint.shards for tensor in shard.tensors
    )
    _check_selection(spec, tensors)
    elements = max((_largest_band(item) for item in tensors if item.pruned and not item.calibrated), default=0)
    memory = {"bands of a tensor": elements * _BYTES_PER_ELEMENT, "code and buffers": FIXED_BYTES}
    return Plan(checkpoint, tensors, memory, saves_masks=spec.save_masks)


def enforce(plan: Plan, spec: PruneSpec) -> None:
    """Stop before anything is written when the plan falls short of what was asked.

    Raises:
        CheckFailed: coverage below `min_coverage`, a tensor that M does not divide under `strict`, or nothing to prune.
    """
    skipped = [item for item in plan.tensors if item.reason and item.reason.startswith(_INDIVISIBLE)]
    if spec.strict and skipped:
        first, more = skipped[0], f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        assert first.choice is not None
        raise CheckFailed(
            f"--strict: {first.choice.pattern} does not fit {first.tensor.name} {list(first.tensor.shape)}{more}",
            "choose another M, or leave them out with --ignore",
            code="low-coverage",
        )
    if not plan.pruned:
        raise CheckFailed(
            "nothing to prune: no tensor is both prunable and selected",
            "see the reasons with --dry-run",
            code="nothing-to-prune",
        )
    if plan.coverage < spec.min_coverage:
        raise CheckFailed(
            f"coverage {plan.coverage:.4f} is below --min-coverage {spec.min_coverage:g}",
            "see what is skipped and why with --dry-run",
            code="low-coverage",
        )


_INDIVISIBLE = "M does not divide"


def _plan_tensor(tensor: DiskTensor, role: Role, spec: PruneSpec) -> TensorPlan:
    if role.layout is None:
        return TensorPlan(tensor, role.reason, None, role.prunable, layer=role.layer)
    if tensor.dtype not in PRUNABLE_DTYPES:
        raise InputRefused(
            f"{tensor.name} is stored as {tensor.dtype}: the checkpoint is quantised or packed",
            "prune the original floating-point checkpoint",
            code="quantised-checkpoint",
        )
    choice = spec.choice(tensor.name)
    reason = _reason_to_keep(tensor, role, spec, choice)
    return TensorPlan(tensor, reason, role.layout, choice=choice, site=role.site, layer=role.layer)


def _reason_to_keep(tensor: DiskTensor, role: Role, spec: PruneSpec, choice: Choice | None) -> str | None:
    """Why a prunable tensor is not pruned this time."""
    assert role.layout is not None
    if spec.only and not any(matches(tensor.name, pattern) for pattern in spec.only):
        return "not selected by --only"
    if any(matches(tensor.name, pattern) for pattern in spec.ignore):
        return "ignored"
    if choice is None:
        return "left alone by the recipe"
    if tensor.parameters == 0:
        return "empty"
    return _misfit(choice.pattern, role, *matrix_size(tensor.shape, role.layout)) or _unseen(choice, role)


def _misfit(pattern: NMPattern, role: Role, out: int, inputs: int) -> str | None:
    if not pattern.divides(out, inputs):
        return f"{_INDIVISIBLE}: {pattern.m} and out {out}, in {inputs}"
    if pattern.transposable and any(piece % pattern.m for piece in role.out_pieces):
        return f"{_INDIVISIBLE}: {pattern.m} and the joined outputs {list(role.out_pieces)}"
    if pattern.transposable and role.rows_move:
        return "its rows are reordered on loading: only --standard patterns survive that"
    return None


def _unseen(choice: Choice, role: Role) -> str | None:
    """Why a method that must see a weight's input cannot have this weight."""
    if choice.method not in CALIBRATED:
        return None
    if role.layer is None:
        return "outside the decoder layers: calibration does not reach it"
    if role.site is None:
        return "its input cannot be seen: calibration does not reach it"
    return None


def _check_selection(spec: PruneSpec, tensors: tuple[TensorPlan, ...]) -> None:
    """A selection that selects nothing is a typing error, not a wish."""
    rules = tuple(pattern for rule in spec.rules for pattern in rule.match)
    for option, patterns in (("--only", spec.only), ("--ignore", spec.ignore), ("the recipe's match", rules)):
        for pattern in patterns:
            if not any(matches(item.tensor.name, pattern) for item in tensors):
                raise UsageError(
                    f"{option} {pattern!r} fits no tensor", "list the names with tsenor inspect", code="bad-selection"
                )


def _largest_band(item: TensorPlan) -> int:
    assert item.layout is not None
    assert item.choice is not None
    first, last = bands(item.tensor, item.layout, item.choice.pattern.m)[0]
    return (last - first) * (item.tensor.parameters // item.tensor.shape[0])
