"""Pruned tensors that belong together: one kind of weight in one layer, all its experts as one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from tsenor_cli.report.records import TensorRecord


@dataclass(frozen=True)
class Group:
    """Tensors of one kind in one layer."""

    layer: int | None  # the first number in their names
    kind: str  # what their names say after it, without other numbers: self_attn.q_proj, mlp.experts.down_proj
    records: tuple[TensorRecord, ...]

    @property
    def name(self) -> str:
        return self.kind if self.layer is None else f"layer {self.layer}, {self.kind}"

    @property
    def parameters(self) -> int:
        return sum(record.parameters for record in self.records)

    @cached_property
    def kept_energy(self) -> float:
        """Σ w² after / before."""
        before = math.fsum(record.energy or 0.0 for record in self.records)
        after = math.fsum((record.energy or 0.0) * (record.kept_energy or 0.0) for record in self.records)
        return after / before if before else 1.0

    @cached_property
    def error(self) -> float | None:
        """Squared output error / squared output, where it is known of all."""
        if any(record.error is None or record.output_energy is None for record in self.records):
            return None
        output = math.fsum(record.output_energy or 0.0 for record in self.records)
        lost = math.fsum((record.error or 0.0) * (record.output_energy or 0.0) for record in self.records)
        return lost / output if output else 0.0

    @cached_property
    def gap(self) -> float:
        """What the masks could at most be missing, of the upper bound."""
        bound = math.fsum(record.upper_bound or 0.0 for record in self.records)
        return (bound - math.fsum(record.objective or 0.0 for record in self.records)) / bound if bound else 0.0

    @cached_property
    def seconds(self) -> float:
        return math.fsum(record.seconds or 0.0 for record in self.records)


def group_pruned(records: Iterable[TensorRecord]) -> list[Group]:
    """All pruned tensors in groups, layer by layer; those outside the layers last."""
    found: dict[tuple[str, int | None, str], list[TensorRecord]] = {}
    for record in records:
        if record.action == "pruned":
            found.setdefault(_parse(record.name), []).append(record)
    several_stacks = len({stack for stack, layer, _ in found if layer is not None}) > 1
    groups = [
        Group(layer, f"{stack}: {kind}" if several_stacks and stack else kind, tuple(members))
        for (stack, layer, kind), members in found.items()
    ]
    return sorted(groups, key=lambda group: math.inf if group.layer is None else group.layer)


def _parse(name: str) -> tuple[str, int | None, str]:
    """What stands before the number of the layer, that number, and what stands behind it."""
    parts = name.removesuffix(".weight").split(".")
    place = next((i for i, part in enumerate(parts) if part.isdecimal() and len(part) < 6), None)
    if place is None:
        return "", None, name.removesuffix(".weight")
    kind = ".".join(part for part in parts[place + 1 :] if not part.isdecimal())
    return ".".join(parts[:place]), int(parts[place]), kind or parts[place - 1]
