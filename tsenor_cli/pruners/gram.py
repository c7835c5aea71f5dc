"""How a Gram matrix is read: from its upper triangle. The lower one is room for its factor (factor.py)."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import NamedTuple

import torch


class Columns(NamedTuple):
    """Some columns of a symmetric matrix, as far down as its diagonal block reaches."""

    here: slice
    above: torch.Tensor  # [here.start, width], a view: the rows before the diagonal block
    corner: torch.Tensor  # [width, width]: the diagonal block, symmetric, a copy


def columns(gram: torch.Tensor, width: int = 512) -> Iterator[Columns]:
    """All columns of a matrix [in, in] of which only the upper triangle counts, `width` at a time, from the left."""
    for first in range(0, len(gram), width):
        yield columns_of(gram, slice(first, min(first + width, len(gram))))


def columns_of(gram: torch.Tensor, here: slice) -> Columns:
    """Those columns."""
    corner = gram[here, here]
    return Columns(here, gram[: here.start, here], corner.triu() + corner.triu(1).T)


def mean_square(gram: torch.Tensor) -> float:
    """The mean of the diagonal, in which methods measure; 1 if that is zero."""
    return float(gram.diagonal().mean()) or 1.0


def is_finite(gram: torch.Tensor) -> bool:
    """Whether all of the matrix is. A sum is finite only if all of its terms are."""
    width = 512  # of what is copied, for the triangle of the diagonal blocks alone
    corners = (slice(first, first + width) for first in range(0, len(gram), width))
    return all(isfinite(gram[here, here].triu().sum() + gram[here, here.stop :].sum()) for here in corners)
