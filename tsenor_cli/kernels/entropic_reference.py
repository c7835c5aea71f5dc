"""The pipeline of the TSENOR paper (arXiv 2505.23949) as one would explain it, one block at a time in float64.

Dykstra's projections run in the log domain. The kernels must do the same: equal rounding for equal keys, and S as near
as float32 allows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tsenor_cli.kernels.contract import Mask
from tsenor_cli.kernels.schedule import FIRST_TAU, GAP_GOAL, LAST_TAU, PER_STAGE, RESIDUAL_GOAL

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


class Relaxed(NamedTuple):
    """The end of Dykstra's iteration on one block."""

    log_p: F64  # [m, m]; S = exp(min(log_p, 0))
    residual: float  # largest difference of a row or column sum from n in the last iteration
    iterations: int
    gap: float  # (bound - value of S) / bound


def dykstra(w: F64, n: int, tau: float | None, most: int) -> Relaxed:
    """Algorithm 1, log P = τ w + U + V, with τ and the potentials doubling; `tau` is the last one times max(w).

    w [m, m] is whole numbers ≥ 0, as in the kernels.
    """
    first, last = FIRST_TAU, LAST_TAU
    if tau is not None:
        first = last = tau
        while first > FIRST_TAU:
            first *= 0.5
    t = first / max(w.max(), 1.0)
    u, v = -t * w.max(axis=1, keepdims=True), np.zeros((1, len(w)))
    iterations, reached = 0, first
    while True:
        residual, stage = np.inf, 0
        per_stage = most if tau is not None and reached >= last else PER_STAGE
        while residual > RESIDUAL_GOAL * n and stage < per_stage and iterations < most:
            log_s = np.minimum(t * w + u + v, 0)  # S = min(P, 1)
            rows = log_sum(log_s, 1)
            columns = log_sum(log_s + np.log(n) - rows, 0)
            u, v = u + np.log(n) - rows, v + np.log(n) - columns  # scale the rows of S to n, then its columns
            residual = max(np.abs(np.exp(rows) - n).max(), np.abs(np.exp(columns) - n).max())
            stage, iterations = stage + 1, iterations + 1
        log_p = t * w + u + v
        value = (t * w * np.exp(np.minimum(log_p, 0))).sum()
        bound = -n * (u.sum() + v.sum()) + np.maximum(log_p, 0).sum()
        gap = abs(bound - value) / max(bound, 1e-30)
        if reached >= last or iterations >= most or (tau is None and gap <= GAP_GOAL):
            return Relaxed(log_p, residual, iterations, gap)
        t, u, v, reached = 2 * t, 2 * u, 2 * v, 2 * reached


def log_sum(x: F64, axis: int) -> F64:
    """The logarithm of Σ exp(x), kept in two dimensions."""
    largest = x.max(axis=axis, keepdims=True)
    result: F64 = largest + np.log(np.exp(x - largest).sum(axis=axis, keepdims=True))
    return result


def greedy(keys: I64, n: int) -> Mask:
    """Algorithm 2: the entries in descending order of their keys [m, m], if their row and column hold fewer than n."""
    kept = np.zeros(keys.shape, np.bool_)
    for k in np.argsort(-keys, axis=None, kind="stable"):
        i, j = divmod(int(k), len(keys))
        kept[i, j] = kept[i].sum() < n and kept[:, j].sum() < n
    return kept


def local_search(w: I64, kept: Mask, n: int, most: int) -> None:
    """Algorithm 2: fill rows and columns that hold fewer than n, as rounding.py says; `kept` changes in place."""
    step = 0
    while (kept.sum(axis=1) < n).any():
        rows, columns = kept.sum(axis=1) < n, kept.sum(axis=0) < n
        i, j = int(rows.argmax()), int(columns.argmax())  # the first ones
        scores = w if step < most else np.zeros_like(w)
        addable = rows[:, None] & columns & ~kept
        exchangeable = kept & ~kept[i] & ~kept[:, j, None]
        if addable.any():
            kept[best(np.where(addable, scores, np.iinfo(np.int64).min))] = True
        else:
            gain = scores[i] + scores[:, j, None] - scores
            row, column = best(np.where(exchangeable, gain, np.iinfo(np.int64).min))
            kept[row, column], kept[i, column], kept[row, j] = False, True, True
        step += 1


def best(gain: I64) -> tuple[int, int]:
    """The place of the largest gain, the first of equal ones."""
    row, column = divmod(int(gain.argmax()), len(gain))
    return row, column
