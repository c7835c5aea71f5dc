"""The exact transposable solver on a CPU: blocks side by side in vector lanes, threads over groups of lanes.

Per group of blocks: bring them into the lanes and normalise, dual passes (passes.py), keep what lies above the duals,
certify (groups.py). A block whose counts are wrong, or whose certificate is not tight, is solved to the end by itself
(repair.py). Lanes never meet and the cuts between chunks are fixed, so neither the position of a block nor the
number of threads changes a bit.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tsenor_cli.kernels.compilation import compiled, compiling
from tsenor_cli.kernels.contract import Mask, Scores, Tally, Untyped, UnusableScoresError
from tsenor_cli.kernels.groups import gather, keep, normalise, put_lane, scatter, take_lane
from tsenor_cli.kernels.lanes import LANES
from tsenor_cli.kernels.passes import call_dual_passes, dual_passes_address
from tsenor_cli.kernels.repair import IMPOSSIBLE, repair, workspace
from tsenor_cli.kernels.threads import CHUNK_SCORES, over_chunks

TOLERANCE = 1e-9  # relative gap above which a block is solved to the end in float64
UNUSABLE = -2  # returned beside IMPOSSIBLE
# What the compiled code adds up, [chunks, 4] float64.
OBJECTIVE, EXCESS, WORST_GAP, REPAIRED = range(4)


def solve_transposable(scores: Scores, n: int, m: int, mask: Mask) -> Tally:
    """Fill `mask` with an optimal transposable n:m mask of `scores`; see contract.py.

    Raises:
        UnusableScoresError: see contract.py.
        RuntimeError: a path that must exist was not found; a bug.
    """
    solve_groups, dual_passes = _compile(scores.dtype, m, n)
    blocks = scores.size // (m * m)
    groups = -(-blocks // LANES)
    size = max(1, CHUNK_SCORES // (m * m * LANES))
    statistics = np.zeros((-(-groups // size), 4))

    def chunk(first: int, last: int) -> None:
        totals = statistics[first // size]
        status = solve_groups(scores, n, m, dual_passes, passes_for(m), TOLERANCE, first, last, mask, totals)
        if status == UNUSABLE:
            raise UnusableScoresError
        if status == IMPOSSIBLE:
            raise RuntimeError(f"the {n}:{m} repair found no augmenting path")

    over_chunks(chunk, groups, size)
    return Tally(
        objective=math.fsum(statistics[:, OBJECTIVE]),
        excess=math.fsum(statistics[:, EXCESS]),
        worst_gap=float(statistics[:, WORST_GAP].max(initial=0.0)),
        repaired=int(statistics[:, REPAIRED].sum()),
    )


def passes_for(m: int) -> int:
    """How many row passes: measured. A pass costs less than the repairs it saves up to about here."""
    return 6 if m <= 4 else 10 if m <= 8 else 12 if m <= 16 else 14 if m <= 32 else 16


@cache
def _compile(dtype: np.dtype[Any], m: int, n: int) -> tuple[Untyped, int]:
    """Everything that runs for this dtype and pattern, compiled or loaded by a call that has nothing to do."""
    with compiling():
        address = dual_passes_address(m, n)
        _solve_groups(
            np.empty((0, 0), dtype), n, m, address, 0, TOLERANCE, 0, 0, np.empty((0, 0), np.bool_), np.empty(4)
        )
    return _solve_groups, address


@compiled
def _solve_groups(
    scores: Scores,
    n: int,
    m: int,
    dual_passes: int,
    passes: int,
    tolerance: float,
    first: int,
    last: int,
    mask: Mask,
    totals: npt.NDArray[np.float64],
) -> int:
    """Solve groups first .. last-1 and add to totals [4]; returns 0, UNUSABLE or IMPOSSIBLE."""
    blocks = scores.size // (m * m)
    raw = np.zeros((m * m, LANES), scores.dtype)
    w = np.empty((m * m, LANES), np.float32)
    u = np.empty((m, LANES), np.float32)
    v = np.empty((m, LANES), np.float32)
    kept = np.empty(m * m, np.uint16)
    certificate = np.empty((2, LANES))
    factors, inverse = np.empty((2, LANES), scores.dtype), np.empty((2, LANES))
    counts = np.empty((m, LANES), np.uint8)
    work = workspace(m)
    for group in range(first, last):
        block, used = group * LANES, min(LANES, blocks - group * LANES)
        gather(scores, m, block, used, raw)
        if not normalise(raw, w, factors, inverse):
            return UNUSABLE
        v[:] = 0.0
        call_dual_passes(dual_passes, w, u, v, passes)
        wrong = keep(w, u, v, n, kept, certificate, counts)
        for t in range(used):
            if (wrong >> t) & 1 or certificate[1, t] > tolerance * certificate[0, t]:
                take_lane(w, u, v, t, work)
                paths = repair(work, n)
                if paths == IMPOSSIBLE:
                    return IMPOSSIBLE
                put_lane(work, t, kept, certificate)
                totals[REPAIRED] += paths > 0
            objective, excess = certificate[0, t], certificate[1, t]
            totals[OBJECTIVE] += objective * inverse[0, t] * inverse[1, t]
            if excess > 0.0:
                totals[EXCESS] += excess * inverse[0, t] * inverse[1, t]
                totals[WORST_GAP] = max(totals[WORST_GAP], excess / (objective + excess))
        scatter(kept, m, block, used, mask)
    return 0
