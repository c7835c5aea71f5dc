"""The Gram matrix of the inputs, damped until it can be factorised.

Everything is in units of the mean of its diagonal: no method depends on how many tokens there were, or how large.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tsenor_cli.errors import TsenorError
from tsenor_cli.pruners.base import InputStats, gram_of
from tsenor_cli.pruners.gram import columns, columns_of, mean_square

RETRIES = 6
_FIRST = 1e-6  # the first retry where no damping at all was asked for
_NOISE = 100  # a pivot is lost in rounding errors below this, in units of n ε and of its own diagonal element
_BLOCK = 192  # columns that are factorised at a time: MKL takes 1.4 times as long for powers of two


class Damping(NamedTuple):
    """What was added to the diagonal, in units of its mean."""

    relative: float
    retries: int


class Factor(NamedTuple):
    """The upper triangular R of H = R Rᵀ, cut into stripes of m columns, as the sweep over them reads it.

    Good until the statistics it is of are factorised with another damping.
    """

    lower: torch.Tensor  # float64 [in, in]: Rᵀ below the diagonal, something else on and above it
    inverses: torch.Tensor  # float64 [in / m, m, m]: R_ss⁻¹, transposed, lower triangular
    local: torch.Tensor  # [in / m, m, m]: R_ss⁻¹ in the dtype of the sweep
    damping: Damping

    def pull(self, first: int, last: int) -> torch.Tensor:
        """For the stripes s in these columns: R_ps R_ss⁻¹, transposed.

        Returns:
            [last - first, last] in the dtype of the sweep: the rows of stripe s and the columns of stripes p < s; what
            stands in the others is not to be read.
        """
        m = self.local.shape[-1]
        stripes = self.lower[first:last, :last].view(-1, m, last)
        return torch.bmm(self.inverses[first // m : last // m], stripes).to(self.local.dtype).flatten(0, 1)


class Correlations(NamedTuple):
    """H with its rows and columns scaled to a diagonal of ones."""

    matrix: torch.Tensor  # [in, in]
    scale: torch.Tensor  # [in]: √H_jj; a weight times it is in the coordinates of the matrix
    damping: Damping


def upper_factor(stats: InputStats, damping: float, m: int, dtype: torch.dtype) -> Factor:
    """Factorise the damped Gram matrix H of `stats`, in float64; the sweep is to be in `dtype`.

    SparseGPT is written with the Cholesky factor U of H⁻¹ = UᵀU. That is R⁻¹, but only the blocks of m columns on its
    diagonal are needed (sparsegpt.py), and these are R_ss⁻¹: H is never inverted. R is kept in the storage of the Gram
    matrix, for the next weight, whatever its m.

    Raises:
        TsenorError: no damping that was tried makes H positive definite.
    """
    factorised = _factorised(stats)
    settled = factorised.settle(damping)
    corners = factorised.corners(m)
    inverses = torch.linalg.solve_triangular(
        corners, torch.eye(m, dtype=corners.dtype, device=corners.device), upper=False
    )
    return Factor(gram_of(stats), inverses, inverses.mT.to(dtype).contiguous(), settled)


def correlations(stats: InputStats, damping: float, dtype: torch.dtype) -> Correlations:
    """The damped Gram matrix of `stats` with a diagonal of ones, in `dtype`; kept in `stats`.

    Raises:
        TsenorError: as for upper_factor; a matrix that is not positive definite is of no use to ALPS either.
    """

    def compute() -> Correlations:
        settled, gram = _factorised(stats).settle(damping), gram_of(stats)
        mean = mean_square(gram)
        scale = (gram.diagonal() / mean + settled.relative).sqrt()
        matrix = torch.empty_like(gram, dtype=dtype)
        for here, above, corner in columns(gram):
            block = torch.cat([above, corner]).div_(mean * scale[here]).div_(scale[: here.stop, None])
            matrix[: here.stop, here] = block
            matrix[here, : here.start] = block[: here.start].T
        matrix.fill_diagonal_(1.0)
        return Correlations(matrix, scale.to(dtype), settled)

    return stats.once((Correlations, damping, dtype), compute)


class _Factorised:
    """A Gram matrix G float64 [in, in] above, and R of the damped one below the diagonal of one storage.

    So nothing of that size is needed beside it, and an attempt that fails has destroyed nothing. LAPACK might do the
    same, but not as torch calls it, which clears the other triangle.
    """

    def __init__(self, gram: torch.Tensor) -> None:
        self._gram = gram
        self._pivots = gram.new_empty(len(gram))  # the diagonal of R: its place in the storage is G's
        self._held: tuple[float, Damping] | None = None  # which R it is: the damping asked for, and the one it took

    def settle(self, damping: float) -> Damping:
        """Have the R of this damping, or of the least of its multiples that suffices, and say which that is.

        Raises:
            TsenorError: none does.
        """
        if self._held is None or self._held[0] != damping:
            self._held = None
            self._held = damping, self._damped_enough(damping)
        return self._held[1]

    def corners(self, m: int) -> torch.Tensor:
        """The blocks of m columns on the diagonal of Rᵀ: float64 [in / m, m, m], lower triangular."""
        down, right = self._gram.stride()
        shape, strides = (len(self._gram) // m, m, m), (m * (down + right), down, right)
        corners = self._gram.as_strided(shape, strides, self._gram.storage_offset()).tril(-1)
        corners.diagonal(dim1=1, dim2=2).copy_(self._pivots.view(-1, m))
        return corners

    def _damped_enough(self, damping: float) -> Damping:
        if not self._gram.diagonal().any():
            damping = 1.0  # H = I: all inputs count alike
        for retries in range(RETRIES + 1):
            if self._cholesky(damping):
                return Damping(damping, retries)
            damping = damping * 10 or _FIRST
        raise TsenorError(
            f"the Gram matrix of the inputs is not positive definite, even with damping {damping / 10:g}",
            "use more calibration text, or --method wanda, which needs no factorisation",
            code="not-positive-definite",
        )

    def _cholesky(self, damping: float) -> bool:
        """Write Rᵀ below the diagonal; False if H is not positive definite beyond rounding errors.

        Blocks of columns from the right to the left, as R is upper triangular. With k for the columns of a block and p
        for those behind it, R_ik R_kkᵀ = H_ik − R_ip R_kpᵀ, of which the rows i = k give R_kk.
        """
        gram, mean = self._gram, mean_square(self._gram)
        for last in range(len(gram), 0, -_BLOCK):
            here, above, corner = columns_of(gram, slice(max(last - _BLOCK, 0), last))
            rows = torch.cat([above, corner]).T.div_(mean)
            corner, behind = rows[:, here.start :], gram[last:]
            corner.diagonal().add_(damping)
            noise = corner.diagonal() * (_NOISE * len(gram) * torch.finfo(gram.dtype).eps)
            rows.addmm_(behind[:, here].T, behind[:, :last], alpha=-1)
            # Of both axes reversed, the lower triangular factor is the upper one.
            reverse, failed_at = torch.linalg.cholesky_ex(corner.flip(0, 1))
            upper = reverse.flip(0, 1)
            self._pivots[here] = upper.diagonal()
            if int(failed_at) or not bool((self._pivots[here].square() > noise).all()):
                return False
            gram[here, : here.start] = torch.linalg.solve_triangular(upper, rows[:, : here.start], upper=True)
            gram[here, here] = gram[here, here].triu() + upper.T.tril(-1)
        return True


def _factorised(stats: InputStats) -> _Factorised:
    return stats.once(_Factorised, lambda: _Factorised(gram_of(stats)))
