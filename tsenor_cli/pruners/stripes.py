"""The columns of a block in SparseGPT's sweep (sparsegpt.py): on a CPU in compiled code, elsewhere in torch."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from tsenor_cli.kernels import stripes
from tsenor_cli.kernels.lanes import LANES


class Block(Protocol):
    """Some columns of a weight, finished one stripe of m after the other.

    Attributes:
        mask: bool [out, columns], what the finished stripes keep.
    """

    mask: torch.Tensor

    def bring_up_to_date(self, first: int) -> torch.Tensor:
        """Add to the stripe at column `first` what the changes before it ask for; give its scores [out, m]."""
        ...

    def finish(self, first: int, mask: torch.Tensor) -> None:
        """Give the columns of the stripe their last values, one after the other; `mask` [out, m] drops some.

        They are rounded here, not at the end, so that later columns make up for the rounding as well.
        """
        ...

    def results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The last values, and the original ones less these: [columns, out] both."""
        ...


def open_block(
    original: torch.Tensor, values: torch.Tensor, pull: torch.Tensor, local: torch.Tensor, narrow: torch.dtype
) -> Block:
    """Begin with a block of columns.

    Args:
        original: weights [columns, out], in the dtype of the sweep.
        values: the same, up to date from the blocks before this one.
        pull: [columns, columns], how much of the change of a column (second axis) is to be added to a later one.
        local: [columns / m, m, m], R_ss⁻¹ of every stripe, upper triangular.
        narrow: the dtype of the weight, which values are rounded to.
    """
    return (_Compiled if values.device.type == "cpu" else InTorch)(original, values, pull, local, narrow)


class InTorch:
    """A block on any device, as one would write it."""

    def __init__(
        self,
        original: torch.Tensor,
        values: torch.Tensor,
        pull: torch.Tensor,
        local: torch.Tensor,
        narrow: torch.dtype,
    ) -> None:
        self._values, self._change, self._pull, self._local = values.clone(), original.clone(), pull, local
        self._narrow = narrow
        self.mask = torch.empty(values.shape[1], len(values), dtype=torch.bool, device=values.device)

    def bring_up_to_date(self, first: int) -> torch.Tensor:
        """See Block."""
        stripe, local = self._stripe(first)
        values = self._values[stripe].addmm_(self._pull[stripe, :first], self._change[:first])
        return (values / local.diagonal()[:, None]).square_().T.contiguous()

    def finish(self, first: int, mask: torch.Tensor) -> None:
        """See Block."""
        stripe, local = self._stripe(first)
        values, keep = self._values[stripe], mask.T.contiguous()
        errors = torch.empty_like(values)
        for j, (column, kept) in enumerate(zip(values, keep, strict=True)):
            column.addmv_(errors[:j].T, local[:j, j], alpha=-1)
            last = (column * kept).to(self._narrow)
            torch.sub(column, last, out=errors[j]).div_(local[j, j])
            column.copy_(last)
        self._change[stripe] -= values
        self.mask[:, stripe] = mask

    def results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See Block."""
        return self._values, self._change

    def _stripe(self, first: int) -> tuple[slice, torch.Tensor]:
        m = self._local.shape[-1]
        return slice(first, first + m), self._local[first // m]


class _Compiled:
    """A block on a CPU, where calls of torch on a few columns would cost more than what they do."""

    def __init__(
        self,
        original: torch.Tensor,
        values: torch.Tensor,
        pull: torch.Tensor,
        local: torch.Tensor,
        narrow: torch.dtype,
    ) -> None:
        arrays = (_grouped(values), _grouped(original), *(part.contiguous().numpy() for part in (pull, local)))
        self._block, (columns, self._out) = stripes.Block(*arrays), values.shape
        self._rounding = stripes.rounding(torch.finfo(narrow), torch.finfo(values.dtype))
        self._scores = torch.empty(self._out, local.shape[-1], dtype=values.dtype)
        self.mask = torch.empty(self._out, columns, dtype=torch.bool)

    def bring_up_to_date(self, first: int) -> torch.Tensor:
        """See Block; the next stripe's scores take the place of this one's."""
        stripes.bring_up_to_date(self._block, first, self._scores.shape[1], self._scores.numpy())
        return self._scores

    def finish(self, first: int, mask: torch.Tensor) -> None:
        """See Block."""
        stripes.finish(self._block, first, self._scores.shape[1], mask.numpy(), self._rounding, self.mask.numpy())

    def results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See Block."""
        return self._columns(self._block.values), self._columns(self._block.change)

    def _columns(self, grouped: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(grouped).transpose(0, 1).flatten(1)[:, : self._out]


def _grouped(columns: torch.Tensor) -> npt.NDArray[Any]:
    """Columns [count, out] as the kernels take them: [groups, count, LANES], zeros behind the last output; a copy."""
    count, out = columns.shape
    padded = columns.new_zeros(count, -(-out // LANES) * LANES)
    padded[:, :out] = columns
    return np.ascontiguousarray(padded.numpy().reshape(count, -1, LANES).transpose(1, 0, 2))
