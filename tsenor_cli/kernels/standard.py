"""The standard N:M mask on a CPU: the n largest of every m consecutive scores, LANES groups side by side.

A score is kept if fewer than n of its group rank before it; of equal scores the one with the lower index ranks first.
Ranking all pairs needs no data-dependent branch, and for m ≤ 64 that beats sorting.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tsenor_cli.kernels.compilation import compiled, compiling
from tsenor_cli.kernels.contract import Mask, Scores, Tally, Untyped, UnusableScoresError
from tsenor_cli.kernels.groups import ALL
from tsenor_cli.kernels.lanes import LANES, as_count, as_float64, bits, load, spread, store, where
from tsenor_cli.kernels.threads import CHUNK_SCORES, over_chunks


def solve_standard(scores: Scores, n: int, m: int, mask: Mask) -> Tally:
    """Fill `mask` with the best standard n:m mask of `scores`; see contract.py. Optimal as it stands: no excess."""
    rank_groups = _compile(scores.dtype)
    groups = scores.size // m
    batches = -(-groups // LANES)
    size = max(1, CHUNK_SCORES // (m * LANES))
    objective = np.zeros(-(-batches // size))

    def chunk(first: int, last: int) -> None:
        total = objective[first // size : first // size + 1]
        if not rank_groups(scores.reshape(-1), n, m, first, last, mask.reshape(-1), total):
            raise UnusableScoresError

    over_chunks(chunk, batches, size)
    return Tally(objective=math.fsum(objective), excess=0.0, worst_gap=0.0, repaired=0)


@cache
def _compile(dtype: np.dtype[Any]) -> Untyped:
    with compiling():
        _rank_groups(np.empty(0, dtype), 1, 2, 0, 0, np.empty(0, np.bool_), np.empty(1))
    return _rank_groups


@compiled
def _rank_groups(
    scores: Scores, n: int, m: int, first: int, last: int, mask: Mask, objective: npt.NDArray[np.float64]
) -> bool:
    """Rank batches first .. last-1 of LANES groups of scores [groups * m] and add what is kept to objective [1].

    Returns False if a score is unusable.
    """
    groups = len(scores) // m
    raw, kept, totals = np.zeros((m, LANES), scores.dtype), np.empty(m, np.uint16), np.empty((1, LANES))
    for batch in range(first, last):
        start, used = batch * LANES * m, min(LANES, groups - batch * LANES)
        for t in range(used):
            for j in range(m):
                raw[j, t] = scores[start + t * m + j]
        if not _rank_lanes(raw, n, kept, totals):
            return False
        for t in range(used):
            objective[0] += totals[0, t]
            for j in range(m):
                mask[start + t * m + j] = (kept[j] >> np.uint16(t)) & np.uint16(1) != 0
    return True


@compiled
def _rank_lanes(raw: Scores, n: int, kept: npt.NDArray[np.uint16], totals: npt.NDArray[np.float64]) -> bool:
    """Keep the n best of raw [m, LANES] in every lane; totals [1, LANES] gets what they sum to."""
    m = len(raw)
    zero, infinity = spread(raw.dtype.type(0.0)), spread(raw.dtype.type(np.inf))
    wanted, nothing = spread(np.uint8(n)), spread(0.0)
    sound, total = infinity > zero, nothing
    for j in range(m):
        x, rank = load(raw, j), spread(np.uint8(0))
        sound = sound & (x >= zero) & (infinity > x)
        for k in range(j):
            rank = rank + as_count(load(raw, k) >= x)
        for k in range(j + 1, m):
            rank = rank + as_count(load(raw, k) > x)
        chosen = wanted > rank
        kept[j] = bits(chosen)
        total = total + where(chosen, as_float64(x), nothing)
    store(totals, 0, total)
    return bool(bits(sound) == ALL)
