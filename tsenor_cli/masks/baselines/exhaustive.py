"""Try all masks: exact beyond doubt, and possible for the smallest M only.

Hu et al., Accelerating Transformer Pre-training with 2:4 Sparsity (ICML 2024), do so for the 90 masks of 2:4.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import torch

from tsenor_cli.errors import UsageError

MOST_CHOICES = 20_000_000  # of m rows, without regard to the columns


def solve(blocks: torch.Tensor, n: int) -> torch.Tensor:
    """Optimal masks [B, M, M], exactly n per row and column; of equally good ones the first."""
    m = blocks.shape[1]
    masks = all_masks(n, m)
    sums = blocks.double().flatten(1) @ masks.double().flatten(1).T
    return masks[sums.argmax(1)]


@cache
def all_masks(n: int, m: int) -> torch.Tensor:
    """Every m×m mask with n per row and per column, bool [count, m, m]: 90 for 2:4, 67,950 for 2:6.

    Raises:
        UsageError: the rows alone can be chosen in more than MOST_CHOICES ways.
    """
    if math.comb(m, n) ** m > MOST_CHOICES:
        raise UsageError(f"too many masks of {n}:{m} to try them all", "M = 4 is what exhaustive search is for")
    rows = [sum(1 << k for k in kept) for kept in itertools.combinations(range(m), n)]
    partial: list[tuple[int, ...]] = [()]
    for _ in range(m):
        partial = [(*mask, row) for mask in partial for row in rows if _fits((*mask, row), n, m)]
    found = np.array([[[row >> k & 1 for k in range(m)] for row in mask] for mask in partial], np.bool_)
    return torch.from_numpy(found.reshape(-1, m, m))


def _fits(mask: tuple[int, ...], n: int, m: int) -> bool:
    """Whether these rows can still become a mask: no column has too many, or too few for the rows to come."""
    counts = [sum(row >> k & 1 for row in mask) for k in range(m)]
    return all(n - (m - len(mask)) <= count <= n for count in counts)
