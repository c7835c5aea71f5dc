"""The best weights on a given support."""

from __future__ import annotations

import torch

from tsenor_cli.pruners.base import bands, dot, multiply

STEPS = 100  # at most
TOLERANCE = 1e-6  # the share of the loss that a step must take off for another to follow


def refit(change: torch.Tensor, mask: torch.Tensor, matrix: torch.Tensor) -> float:
    """Minimise tr(E H Eᵀ) over the entries of E [out, in] where `mask` is true; the others stay as they are.

    Conjugate gradients, every row its own problem; with ones on the diagonal of `matrix` that is also the Jacobi-
    preconditioned method. No step can make it worse.

    Args:
        change: E [out, in] to start from, changed in place.
        mask: bool [out, in].
        matrix: H, positive definite [in, in], of the dtype of `change`.

    Returns:
        tr(E H Eᵀ).
    """
    gradient = change @ matrix
    loss = dot(gradient, change)
    residual = multiply(gradient.neg_(), mask, out=gradient)
    direction, product = residual.clone(), torch.empty_like(residual)
    squares = _row_dots(residual, residual)
    for _ in range(STEPS):
        torch.mm(direction, matrix, out=product)
        length = _ratio(squares, _row_dots(product, direction))
        gain = float((length * squares).sum(dtype=torch.float64))
        if not gain > 0:
            break
        change.addcmul_(direction, length[:, None])
        loss -= gain
        if gain <= TOLERANCE * loss:
            break
        residual.addcmul_(multiply(product, mask, out=product), length[:, None], value=-1)
        before, squares = squares, _row_dots(residual, residual)
        direction.mul_(_ratio(squares, before)[:, None]).add_(residual)
    return max(loss, 0.0)


def loss_of(change: torch.Tensor, matrix: torch.Tensor) -> float:
    """tr(E H Eᵀ) of E [out, in]."""
    return dot(change @ matrix, change)


def _row_dots(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[out] of two [out, in], without their product."""
    return torch.cat([(a[rows] * b[rows]).sum(1) for rows in bands(len(a))])


def _ratio(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """0 for rows that are done, where both are."""
    return torch.where(below > 0, above / below, 0.0)
