"""What of a checkpoint can be pruned, to which M, and which 2:4 hardware kernels could take it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tsenor_cli.checkpoint.adapter.roles import Role, read_roles
from tsenor_cli.checkpoint.layouts import matrix_size
from tsenor_cli.checkpoint.reader import open_checkpoint
from tsenor_cli.checkpoint.shard import DiskTensor
from tsenor_cli.checkpoint.source import resolve_checkpoint
from tsenor_cli.specs import MAX_M

# Rows and columns of W must be multiples of these (torch.sparse: SparseSemiStructuredTensorCUTLASS and …CUSPARSELT).
_KERNELS = {
    "CUTLASS": {"F16": (32, 64), "BF16": (32, 64), "F32": (32, 32)},
    "cuSPARSELt": {"F16": (16, 16), "BF16": (16, 16)},
}


@dataclass(frozen=True)
class TensorInspection:
    """One tensor; `reason` says why it cannot be pruned."""

    name: str
    file: str
    dtype: str
    shape: list[int]
    parameters: int
    prunable: bool
    layout: str | None
    reason: str | None
    standard_m: list[int]  # every M from 2 to 64 that divides the input axis
    transposable_m: list[int]  # … and the output axis
    kernels: list[str]


@dataclass(frozen=True)
class Inspection:
    """A whole checkpoint."""

    directory: str
    tensors: list[TensorInspection]

    @property
    def prunable_tensors(self) -> int:
        return sum(item.prunable for item in self.tensors)

    @property
    def prunable_parameters(self) -> int:
        return sum(item.parameters for item in self.tensors if item.prunable)

    @property
    def total_parameters(self) -> int:
        return sum(item.parameters for item in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "prunable_parameters": self.prunable_parameters,
            "total_parameters": self.total_parameters,
            **asdict(self),
        }


def inspect_checkpoint(model: str) -> Inspection:
    """Inspect a local checkpoint or a hub id, from headers alone.

    Raises:
        InputRefused: the checkpoint cannot be read.
    """
    checkpoint = open_checkpoint(*resolve_checkpoint(model))
    roles = read_roles(checkpoint)
    return Inspection(
        str(checkpoint.directory), [_inspect(tensor, roles[tensor.name]) for tensor in checkpoint.tensors.values()]
    )


def _inspect(tensor: DiskTensor, role: Role) -> TensorInspection:
    standard, transposable, kernels = [], [], []
    if role.layout is not None:
        out, inputs = matrix_size(tensor.shape, role.layout)
        standard = [m for m in range(2, MAX_M + 1) if inputs % m == 0]
        if not role.rows_move:
            transposable = [m for m in standard if not any(piece % m for piece in (out, *role.out_pieces))]
        kernels = [name for name, sizes in _KERNELS.items() if _takes(sizes.get(tensor.dtype), out, inputs)]
    return TensorInspection(
        tensor.name,
        tensor.path.name,
        tensor.dtype,
        list(tensor.shape),
        tensor.parameters,
        role.prunable,
        role.layout,
        role.reason,
        standard,
        transposable,
        kernels,
    )


def _takes(multiples: tuple[int, int] | None, out: int, inputs: int) -> bool:
    return multiples is not None and out % multiples[0] == 0 and inputs % multiples[1] == 0
