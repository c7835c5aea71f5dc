"""The standard N:M mask on a CPU: the n largest of every m consecutive scores, LANES groups side by side.

A score is kept if fewer than n of its group rank before it; of equal scores the one with the lower index ranks first.
Ranking all pairs needs no data-dependent branch, and for m ≤ 64 that beats sorting. Scores are compared by their bits,
which order like the numbers, as none is negative.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tsenor_cli.kernels.compilation import compiled, compiling
from tsenor_cli.kernels.contract import Mask, Pointer, Scores, Tally, Untyped, UnusableScoresError, exact_sum
from tsenor_cli.kernels.groups import gather_line, scatter_line
from tsenor_cli.kernels.lanes import (
    LANES,
    as_bits,
    as_count,
    as_float,
    as_float64,
    from_bits,
    from_mask,
    infinity_bits,
    lanes,
    largest_of,
    load,
    pointer,
    smallest_of,
    spread,
    store,
    sum_of,
    where,
)
from tsenor_cli.kernels.threads import CHUNK_SCORES, over_chunks


class _Scratch(NamedTuple):
    """What one thread writes to."""

    places: Untyped  # [LANES] int64, where the groups start
    raw: Untyped  # [m, LANES] of the scores' type
    kept: Untyped  # [m, LANES] uint8


def solve_standard(scores: Scores, n: int, m: int, mask: Mask, *, absolute: bool = False) -> Tally:
    """Fill `mask` with the best standard n:m mask of `scores`; see contract.py. Optimal as it stands: no excess."""
    rank_groups = _compile(scores.dtype)
    groups = scores.size // m
    batches = -(-groups // LANES)
    size = max(1, CHUNK_SCORES // (m * LANES))
    objective = np.zeros(-(-batches // size))
    flat, flat_mask = scores.reshape(-1), mask.view(np.uint8).reshape(-1)

    def chunk(first: int, last: int, scratch: _Scratch) -> None:
        total = objective[first // size : first // size + 1]
        if not rank_groups(flat, absolute, n, m, first, last, flat_mask, total, scratch):
            raise UnusableScoresError

    over_chunks(chunk, batches, size, (("standard", scores.dtype, m), lambda: _scratch(scores.dtype, m)))
    return Tally(objective=exact_sum(objective), excess=0.0, worst_gap=0.0, repaired=0)


def _scratch(dtype: np.dtype[Any], m: int) -> _Scratch:
    return _Scratch(np.zeros(LANES, np.int64), lanes(m, dtype), lanes(m, np.uint8))


@cache
def _compile(dtype: np.dtype[Any]) -> Untyped:
    with compiling():
        _rank_groups(np.empty(0, dtype), False, 1, 2, 0, 0, np.empty(0, np.uint8), np.empty(1), _scratch(dtype, 2))
    return _rank_groups


@compiled
def _rank_groups(
    scores: Scores,
    absolute: bool,
    n: int,
    m: int,
    first: int,
    last: int,
    mask: Mask,
    objective: npt.NDArray[np.float64],
    scratch: _Scratch,
) -> bool:
    """Rank batches first .. last-1 of LANES groups of scores [groups * m] and add what is kept to objective [1].

    Returns False if a score is unusable.
    """
    groups, places = scores.size // m, pointer(scratch.places)
    raw, kept = pointer(scratch.raw), pointer(scratch.kept)
    for batch in range(first, last):
        start, used = batch * LANES, min(LANES, groups - batch * LANES)
        for t in range(LANES):
            places[t] = (start + min(t, used - 1)) * m  # idle lanes repeat the last group
        gather_line(pointer(scores), m, places, raw)
        total, sound = rank_lanes(raw, absolute, n, m, kept)
        if not sound:
            return False
        objective[0] += sum_of(where(from_mask((1 << used) - 1), total, spread(0.0)))
        scatter_line(kept, m, places, pointer(mask))
    return True


@compiled
def rank_lanes(raw: Pointer, absolute: bool, n: int, m: int, kept: Pointer) -> tuple[Untyped, bool]:
    """Keep the n best of raw [m, LANES] in every lane; return what they sum to, and whether all scores are usable."""
    wanted, total, sound = spread(np.uint8(n)), spread(0.0), True
    for j in range(m):
        x, rank = as_bits(load(raw, j), absolute), spread(np.uint8(0))
        sound = sound and smallest_of(x) >= 0 and largest_of(x) < infinity_bits(load(raw, j))
        for k in range(j):
            rank = rank + as_count(as_bits(load(raw, k), absolute) >= x)
        for k in range(j + 1, m):
            rank = rank + as_count(as_bits(load(raw, k), absolute) > x)
        chosen = wanted > rank
        store(kept, j, as_count(chosen))
        total = total + where(chosen, as_float64(as_float(from_bits(x, load(raw, j)))), spread(0.0))
    return total, sound
