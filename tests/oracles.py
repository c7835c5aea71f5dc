"""Judges of masks that know nothing of how masks are made here: enumeration, flows, linear programs.

Blocks are [M, M] arrays of any dtype, non-negative and finite. The best kept sum is a float.
"""

from __future__ import annotations

import numpy as np
import torch

from tsenor_cli.masks.baselines import exhaustive, flow, linear_program


def all_masks(n: int, m: int) -> np.ndarray:
    """Every m×m mask with n per row and per column, bool [count, m, m]."""
    return exhaustive.all_masks(n, m).numpy()


def best_by_enumeration(block: np.ndarray, n: int) -> float:
    """The largest kept sum over all masks."""
    return float((all_masks(n, len(block)) * block.astype(np.float64)).sum(axis=(1, 2)).max())


def best_by_flow(block: np.ndarray, n: int) -> float:
    """The largest kept sum, by a flow of n units from every row through unit arcs into every column."""
    scores = block.astype(np.float64)
    kept = flow.solve(torch.from_numpy(scores)[None], n)[0].numpy()
    assert (kept.sum(axis=0) == n).all()
    assert (kept.sum(axis=1) == n).all()
    return float(scores[kept].sum())


def best_by_highs(block: np.ndarray, n: int) -> float:
    """The largest kept sum, by linear programming: HiGHS, from scipy, which is also where OR-tools is not."""
    scores = block.astype(np.float64)
    largest = scores.max() or 1.0
    kept = linear_program.solve_highs(torch.from_numpy(scores / largest)[None], n)[0].numpy()
    return float(scores[kept].sum())


def best_of_group(group: np.ndarray, n: int) -> float:
    """The largest sum of n scores of one group [M]."""
    return float(np.sort(group.astype(np.float64))[-n:].sum())
