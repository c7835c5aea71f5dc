"""torch's 2:4 kernels: which a device has, what they take, and how a weight is packed for them.

What needs CUDA is behind `find_kernels`. Read from torch 2.13; its classes for these tensors are prototypes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)


@dataclass(frozen=True)
class Packed:
    """A weight W [out, in] as both products take it."""

    forward: torch.Tensor  # linear(x, forward) = x Wᵀ
    backward: torch.Tensor  # dy @ backward = dy W


Pack = Callable[[torch.Tensor], Packed]  # W [out, in], contiguous, of one of the dtypes; drops what is not 2:4


@dataclass(frozen=True)
class Kernels:
    """A library of 2:4 products."""

    name: str
    dtypes: frozenset[torch.dtype]
    multiple: int  # of the rows and of the columns of W
    pack: Pack  # W is 2:4 along rows and columns: both products are sparse
    pack_rows: Pack  # W is 2:4 along rows: x Wᵀ is sparse, dy W dense


def find_kernels(device: torch.device) -> Kernels | str:
    """Those that torch would take on `device`, or why there are none."""
    if device.type != "cuda":
        return f"torch has no 2:4 kernels on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    this = "{}.{}".format(*capability)
    if capability < (8, 0):
        return f"2:4 kernels need compute capability 8.0 or more, this GPU has {this}"
    if torch.backends.cusparselt.is_available() and not SparseSemiStructuredTensor._FORCE_CUTLASS:  # noqa: SLF001
        return CUSPARSELT
    if capability[0] == 8:
        return CUTLASS
    return f"torch's CUTLASS kernels are for compute capability 8.x, this GPU has {this}; cuSPARSELt is not there"


def _pack_cusparselt(weight: torch.Tensor) -> Packed:
    """Twice through cuSPARSELt itself.

    torch's prune_dense_static_sort does it in one kernel, but lays out the metadata as found on cards of compute
    capability 8.x, where alone torch tests it, and wants multiples of 128.
    """
    rows, columns = (torch._cslt_compress(w) for w in (weight, weight.t().contiguous()))  # noqa: SLF001
    both = SparseSemiStructuredTensorCUSPARSELT(weight.shape, rows, None, columns, None, None)
    return Packed(both, both)


def _pack_cutlass(weight: torch.Tensor) -> Packed:
    """In one kernel. By absolute values every nonzero finds room before a zero is looked at, so none is lost."""
    both = SparseSemiStructuredTensorCUTLASS.prune_dense_static_sort(weight, "largest_abs_values_greedy")
    return Packed(both, both)


_HALVES = frozenset({torch.float16, torch.bfloat16})
CUSPARSELT = Kernels(
    "cuSPARSELt",
    _HALVES,
    16,
    _pack_cusparselt,
    lambda weight: Packed(SparseSemiStructuredTensorCUSPARSELT.from_dense(weight), weight),
)
CUTLASS = Kernels(
    "CUTLASS",
    _HALVES,
    64,  # its tiles are 32 × 64, and those of the transpose 64 × 32
    _pack_cutlass,
    lambda weight: Packed(SparseSemiStructuredTensorCUTLASS.from_dense(weight), weight),
)
