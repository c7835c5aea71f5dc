"""The best weights on a given support."""

from __future__ import annotations

import torch

STEPS = 100  # at most
TOLERANCE = 1e-6  # the share of the loss that a step must take off for another to follow


def refit(start: torch.Tensor, mask: torch.Tensor, matrix: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Minimise tr(E H Eᵀ) over the entries of E [out, in] where `mask` is true; the others stay as in `start`.

    Conjugate gradients, every row its own problem; with ones on the diagonal of `matrix` that is also the Jacobi-
    preconditioned method. No step can make it worse.

    Args:
        start: [out, in].
        mask: bool [out, in].
        matrix: H, positive definite [in, in], of the dtype of `start`.

    Returns:
        E, and tr(E H Eᵀ).
    """
    change = start.clone()
    gradient = change @ matrix
    loss = _dot(gradient, change)
    residual = gradient.neg_().mul_(mask)
    direction = residual.clone()
    squares = residual.square().sum(1)
    for _ in range(STEPS):
        product = direction @ matrix
        length = _ratio(squares, (product * direction).sum(1))
        gain = float((length * squares).sum(dtype=torch.float64))
        if not gain > 0:
            break
        change.addcmul_(direction, length[:, None])
        loss -= gain
        if gain <= TOLERANCE * loss:
            break
        residual.addcmul_(product.mul_(mask), length[:, None], value=-1)
        before, squares = squares, residual.square().sum(1)
        direction.mul_(_ratio(squares, before)[:, None]).add_(residual)
    return change, max(loss, 0.0)


def loss_of(change: torch.Tensor, matrix: torch.Tensor) -> float:
    """tr(E H Eᵀ) of E [out, in]."""
    return _dot(change @ matrix, change)


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))


def _ratio(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """0 for rows that are done, where both are."""
    return torch.where(below > 0, above / below, 0.0)
