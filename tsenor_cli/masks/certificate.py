"""The proof of optimality, readable: nothing here depends on how a mask was found."""

from __future__ import annotations

import torch


def objective(blocks: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Σ of the kept scores of each block: [B, M, M], bool [B, M, M] → [B] float64."""
    return torch.where(mask, blocks.double(), 0.0).sum((1, 2))


def upper_bound(blocks: torch.Tensor, u: torch.Tensor, v: torch.Tensor, n: int) -> torch.Tensor:
    """n(Σ u + Σ v) + Σ max(0, w - u - v) of each block: [B, M, M], [B, M], [B, M] → [B] float64.

    Weak duality: no mask with n per row and column keeps more than this, whatever u and v are (docs/mathematics.md).
    """
    u, v = u.double(), v.double()
    reduced = blocks.double() - u[:, :, None] - v[:, None, :]
    return n * (u.sum(1) + v.sum(1)) + reduced.clamp_min(0.0).sum((1, 2))


def excess(blocks: torch.Tensor, mask: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """upper_bound - objective of each block [B], float64, for masks with exactly n per row and column.

    The same number without cancellation: Σ of max(0, u + v - w) over kept entries and max(0, w - u - v) over others.
    """
    reduced = blocks.double() - u.double()[:, :, None] - v.double()[:, None, :]
    return torch.where(mask, -reduced, reduced).clamp_min(0.0).sum((1, 2))
