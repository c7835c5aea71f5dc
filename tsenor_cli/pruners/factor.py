"""The Gram matrix of the inputs, damped until it can be factorised.

Everything is in units of the mean of its diagonal: no method depends on how many tokens there were, or how large.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tsenor_cli.errors import TsenorError
from tsenor_cli.pruners.base import InputStats, gram_of

RETRIES = 6
_FIRST = 1e-6  # the first retry where no damping at all was asked for
_NOISE = 100  # a pivot is lost in rounding errors below this, in units of n ε and of its own diagonal element


class Damping(NamedTuple):
    """What was added to the diagonal, in units of its mean."""

    relative: float
    retries: int


class Factor(NamedTuple):
    """The upper triangular R of H = R Rᵀ, cut into stripes of m columns, as the sweep over them reads it."""

    pull: torch.Tensor  # [in, in]: R_ps R_ss⁻¹, transposed, in the rows of stripe s and the columns of stripes p < s
    local: torch.Tensor  # [in / m, m, m]: R_ss⁻¹, upper triangular
    damping: Damping


class Correlations(NamedTuple):
    """H with its rows and columns scaled to a diagonal of ones."""

    matrix: torch.Tensor  # [in, in]
    scale: torch.Tensor  # [in]: √H_jj; a weight times it is in the coordinates of the matrix
    damping: Damping


def upper_factor(stats: InputStats, damping: float, m: int, dtype: torch.dtype) -> Factor:
    """Factorise the damped Gram matrix H of `stats`, in float64; the result is of `dtype`, and kept in `stats`.

    SparseGPT is written with the Cholesky factor U of H⁻¹ = UᵀU. That is R⁻¹, but only the blocks of m columns on its
    diagonal are needed (sparsegpt.py), and these are R_ss⁻¹: H is never inverted. R itself is what Cholesky gives of H
    with rows and columns in reverse order.

    Raises:
        TsenorError: no damping that was tried makes H positive definite.
    """

    def compute() -> Factor:
        reverse, settled = _factorise(stats, damping)
        size = len(reverse)
        pull, local = torch.zeros(size, size, dtype=dtype), torch.empty(size // m, m, m, dtype=dtype)
        one = torch.eye(m, dtype=reverse.dtype)
        for stripe, first in enumerate(range(0, size, m)):
            rows = reverse[size - first - m : size - first, size - first - m :].flip(0, 1)  # of Rᵀ, to the diagonal
            inverse = torch.linalg.solve_triangular(rows[:, first:], one, upper=False)
            local[stripe] = inverse.T
            pull[first : first + m, :first] = inverse @ rows[:, :first]
        return Factor(pull, local, settled)

    return stats.once((Factor, damping, m, dtype), compute)


def correlations(stats: InputStats, damping: float, dtype: torch.dtype) -> Correlations:
    """The damped Gram matrix of `stats` with a diagonal of ones, in `dtype`; kept in `stats`.

    Raises:
        TsenorError: as for upper_factor; a matrix that is not positive definite is of no use to ALPS either.
    """

    def compute() -> Correlations:
        settled = stats.once((Damping, damping), lambda: _factorise(stats, damping)[1])
        gram, mean = _gram(stats)
        scale = (gram.diagonal() / mean + settled.relative).sqrt()
        matrix = (gram / (mean * scale)).div_(scale[:, None]).to(dtype)
        matrix.fill_diagonal_(1.0)
        return Correlations(matrix, scale.to(dtype), settled)

    return stats.once((Correlations, damping, dtype), compute)


def _gram(stats: InputStats) -> tuple[torch.Tensor, float]:
    """The matrix and its unit, which is 1 if the matrix is zero."""
    gram = gram_of(stats)
    return gram, float(gram.diagonal().mean()) or 1.0


def _factorise(stats: InputStats, damping: float) -> tuple[torch.Tensor, Damping]:
    """Lᵀ [in, in] of L Lᵀ = H in reverse order, and the damping that it took."""
    gram, mean = _gram(stats)
    if not gram.any():
        damping = 1.0  # H = I: all inputs count alike
    for retries in range(RETRIES + 1):
        matrix = gram.flip(0, 1).div_(mean)
        matrix.diagonal().add_(damping)
        if _cholesky(matrix):
            return matrix, Damping(damping, retries)
        damping = damping * 10 or _FIRST
    raise TsenorError(
        f"the Gram matrix of the inputs is not positive definite, even with damping {damping / 10:g}",
        "use more calibration text, or --method wanda, which needs no factorisation",
    )


def _cholesky(matrix: torch.Tensor) -> bool:
    """Lᵀ in place of symmetric `matrix` [n, n] = L Lᵀ; False if it is not positive definite beyond rounding errors.

    LAPACK works on columns, in place if rows of the result are what torch takes for columns.
    """
    before = matrix.diagonal().clone()
    failed_at = torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(matrix.mT, out=(matrix.mT, failed_at))
    noise = _NOISE * len(matrix) * torch.finfo(matrix.dtype).eps * before
    return int(failed_at) == 0 and bool((matrix.diagonal().square() > noise).all())
