"""The exact transposable solver on a CPU: dual passes with LANES blocks in lockstep, then what they leave in doubt.

LANES blocks share the vector registers (structure of arrays). All of it is integer arithmetic on one block at a time,
and the mask it looks for is the only best one (ties.py): it depends neither on how the work is cut nor on where it
starts. Derivations: docs/mathematics.md.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tsenor_cli.kernels.coarse import Coarse, coarse, coarse_pointers, coarsen, refine
from tsenor_cli.kernels.compilation import compiled, compiling
from tsenor_cli.kernels.contract import (
    CERTIFY,
    DualArray,
    Mask,
    Pointer,
    Scores,
    Tally,
    Untyped,
    UnusableScoresError,
    exact_sum,
)
from tsenor_cli.kernels.groups import DOWN, Q_BITS, UP, find_places, gather, keep, quantise, scatter
from tsenor_cli.kernels.lanes import CACHE_LINE, LANES, first_bit, lanes, load, offset, pointer, spread, store, sum_of
from tsenor_cli.kernels.mend import mend, weigh_block
from tsenor_cli.kernels.passes import LIMIT, Ahead, Schedule, call_dual_passes, dual_passes_address
from tsenor_cli.kernels.repair import IMPOSSIBLE, Workspace, pointers, workspace
from tsenor_cli.kernels.settle import FINER, Queue, put_in_queue, queue, settle
from tsenor_cli.kernels.threads import CHUNK_SCORES, over_chunks
from tsenor_cli.kernels.ties import SCORE_BITS, tie_table

UNUSABLE = -2  # returned beside IMPOSSIBLE
# What the compiled code adds up, [chunks, 4] float64.
OBJECTIVE, EXCESS, WORST_GAP, REPAIRED = range(4)
# For m up to: from nothing, and from given duals.
_SCHEDULES = {
    4: (Schedule(0, 0, 11, 0), Schedule(0, 0, 5, 0)),
    8: (Schedule(0, 0, 13, 6), Schedule(0, 0, 7, 6)),
    16: (Schedule(2, 13, 1, 6), Schedule(1, 7, 1, 6)),
    32: (Schedule(2, 17, 1, 8), Schedule(1, 11, 1, 8)),
    64: (Schedule(2, 17, 1, 10), Schedule(1, 13, 1, 10)),
}
_NO_DUALS: DualArray = np.empty((0, 2, 0))


def solve_transposable(
    scores: Scores,
    n: int,
    m: int,
    mask: Mask,
    warm: DualArray | None = None,
    duals: DualArray | None = None,
    *,
    absolute: bool = False,
) -> Tally:
    """Fill `mask` with the optimal transposable n:m mask of `scores`; see contract.py.

    Start from the duals `warm`, if given: fewer passes do when they fit similar scores, and any finite ones lead to the
    same mask. Fill `duals`, if given, with optimal ones.

    Raises:
        UnusableScoresError: see contract.py.
        RuntimeError: a path that must exist was not found; a bug.
    """
    solve_groups, dual_passes = _compile(scores.dtype, m, n)
    passes = schedule(m, warm=warm is not None)
    blocks = scores.size // (m * m)
    groups = -(-blocks // LANES)
    size = max(1, CHUNK_SCORES // (m * m * LANES))
    statistics = np.zeros((-(-groups // size), 4))
    start, found = (_NO_DUALS if given is None else given for given in (warm, duals))
    ties = tie_table(n, m)

    def chunk(first: int, last: int, scratch: tuple[_Group, Queue, Workspace]) -> None:
        totals = statistics[first // size]
        status = solve_groups(
            scores,
            absolute,
            n,
            m,
            dual_passes,
            passes,
            first,
            last,
            mask.view(np.uint8),
            start,
            found,
            totals,
            *scratch,
        )
        if status == UNUSABLE:
            raise UnusableScoresError
        if status == IMPOSSIBLE:
            raise RuntimeError(f"no augmenting path in a {n}:{m} block: please report this")

    over_chunks(chunk, groups, size, (("exact", scores.dtype, n, m), lambda: scratch_for(scores.dtype, ties)))
    return Tally(
        objective=exact_sum(statistics[:, OBJECTIVE]),
        excess=exact_sum(statistics[:, EXCESS]),
        worst_gap=float(statistics[:, WORST_GAP].max(initial=0.0)),
        repaired=int(statistics[:, REPAIRED].sum()),
        iterations=passes.first + passes.coarse + passes.last if blocks else 0,
    )


def schedule(m: int, *, warm: bool = False) -> Schedule:
    """Measured (docs/decisions/0008): a pass costs less than the repairs it saves up to about here."""
    return next(schedules[warm] for largest, schedules in _SCHEDULES.items() if m <= largest)


class _Group(NamedTuple):
    """LANES blocks on their way through the dual passes."""

    places: Untyped  # [LANES] int64, see groups.py
    raw: Untyped  # [m * m, LANES] of the scores' type
    q: Untyped  # [m * m, LANES] int32
    coarse: Coarse
    kept: Untyped  # [m * m, LANES] uint8
    u: Untyped  # [m, LANES] int32
    v: Untyped  # [m, LANES] int32
    counts: Untyped  # [m, LANES] uint8
    factors: Untyped  # [4, LANES] float64
    objective: Untyped  # [1, LANES] float64, a running sum


def scratch_for(dtype: np.dtype[Any], ties: npt.NDArray[np.int64]) -> tuple[_Group, Queue, Workspace]:
    """Allocate what one thread writes to: once, and never in compiled code."""
    m = len(ties)
    group = _Group(
        places=np.zeros(LANES, np.int64),
        raw=lanes(m * m, dtype),
        q=lanes(m * m, np.int32),
        coarse=coarse(m),
        kept=lanes(m * m, np.uint8),
        u=lanes(m, np.int32),
        v=lanes(m, np.int32),
        counts=lanes(m, np.uint8),
        factors=lanes(4, np.float64),
        objective=lanes(1, np.float64),
    )
    return group, queue(dtype, ties), workspace(dtype, ties)


@cache
def _compile(dtype: np.dtype[Any], m: int, n: int) -> tuple[Untyped, tuple[int, int]]:
    """Everything that runs for this dtype and pattern, compiled or loaded by a call that has nothing to do."""
    nothing, no_mask, ties = np.empty((0, m), dtype), np.empty((0, m), np.uint8), tie_table(n, m)
    with compiling():
        addresses = dual_passes_address(m, n), dual_passes_address(m, n, 16)
        scratch, nowhere = scratch_for(dtype, ties), (_NO_DUALS, _NO_DUALS, np.empty(4))
        _solve_groups(nothing, False, n, m, addresses, schedule(m), 0, 0, no_mask, *nowhere, *scratch)
    return _solve_groups, addresses


@compiled
def _solve_groups(
    scores: Scores,
    absolute: bool,
    n: int,
    m: int,
    dual_passes: tuple[int, int],
    passes: Schedule,
    first: int,
    last: int,
    mask: Mask,
    warm: DualArray,
    duals: DualArray,
    totals: npt.NDArray[np.float64],
    group: _Group,
    queue: Queue,
    workspace: Workspace,
) -> int:
    """Solve groups first .. last-1 and add to totals [4]; returns 0, UNUSABLE or IMPOSSIBLE."""
    columns, blocks, work = scores.shape[1], scores.size // (m * m), pointers(workspace)
    raw, q, kept, places = pointer(group.raw), pointer(group.q), pointer(group.kept), pointer(group.places)
    u, v, factors, objective = pointer(group.u), pointer(group.v), pointer(group.factors), pointer(group.objective)
    ties = pointer(queue.visible)
    # No literals to what is large: numba would compile it once for each of them.
    waiting, one, full = np.int64(0), np.int64(1), np.int64(LANES)
    store(objective, 0, spread(0.0))
    for number in range(first, last):
        block, used = number * LANES, min(LANES, blocks - number * LANES)
        find_places(block, used, columns, m, places)
        gather(pointer(scores), columns, m, places, raw)
        if not quantise(raw, absolute, ties, m, q, factors):
            return UNUSABLE
        start_duals(warm, block, used, factors, m, v)
        ahead = next_group(scores, block + 2 * LANES, m)  # one group ahead is too late: measured
        find_duals(dual_passes, passes, q, m, coarse_pointers(group.coarse), ahead, u, v)
        uneven, doubtful, tied = keep(raw, absolute, ties, q, u, v, n, m, used, kept, objective, pointer(group.counts))
        scatter(kept, columns, m, places, pointer(mask))
        if len(duals) > 0:
            for t in range(used):
                put_duals(u, v, t, LANES, 2.0**-Q_BITS, factors, t, duals[block + t])
        alone = (uneven | doubtful) & ~tied
        while alone:
            t = first_bit(alone)
            alone &= alone - 1
            afresh = (doubtful >> t) & 1 != 0
            if mend_lane(scores, absolute, columns, n, m, t, block + t, afresh, mask, group, work, duals, totals) < 0:
                return IMPOSSIBLE
        while tied:
            t = first_bit(tied)
            tied &= tied - 1
            put_in_queue(queue, waiting, block + t, places[t], u, v, t, m)
            waiting = settle_queue(full, scores, absolute, columns, n, m, waiting + 1, mask, queue, work, duals, totals)
            if waiting == IMPOSSIBLE:
                return IMPOSSIBLE
    totals[OBJECTIVE] += sum_of(load(objective, 0))
    return int(settle_queue(one, scores, absolute, columns, n, m, waiting, mask, queue, work, duals, totals))


@compiled
def find_duals(
    dual_passes: tuple[int, int],
    passes: Schedule,
    q: Pointer,
    m: int,
    work: Coarse,
    ahead: Ahead,
    u: Pointer,
    v: Pointer,
) -> None:
    """Run the dual passes from v, and meanwhile prefetch what is ahead."""
    if passes.coarse > 0:
        call_dual_passes(dual_passes[0], q, u, v, passes.first, 0, Ahead(0, 0, 0))
        coarsen(q, u, v, m, work)
        call_dual_passes(dual_passes[1], work.q, work.u, work.v, passes.coarse, passes.furthest, ahead)
        refine(work, m, v)
        ahead = Ahead(0, 0, 0)
    call_dual_passes(dual_passes[0], q, u, v, passes.last, passes.furthest, ahead)


@compiled
def next_group(scores: Scores, block: int, m: int) -> Ahead:
    """Where LANES blocks from `block` on lie, if there are so many side by side."""
    across = scores.shape[1] // m
    first = (block // across * scores.shape[1] + block % across) * m
    return Ahead(
        scores.ctypes.data + first * scores.itemsize,
        scores.shape[1] * scores.itemsize,
        LANES * m * scores.itemsize // CACHE_LINE,
    )


@compiled
def mend_lane(
    scores: Scores,
    absolute: bool,
    columns: int,
    n: int,
    m: int,
    t: int,
    block: int,
    afresh: bool,
    mask: Mask,
    group: _Group,
    work: Workspace,
    duals: DualArray,
    totals: npt.NDArray[np.float64],
) -> int:
    """Mend the block of lane t (see mend.py) and add it to totals; returns 0, or IMPOSSIBLE."""
    u, v, factors, lines = pointer(group.u), pointer(group.v), pointer(group.factors), -(-m // LANES) * LANES
    for k in range(m):
        work.duals[k], work.duals[lines + k] = np.int64(v[k * LANES + t]) << FINER, np.int64(u[k * LANES + t]) << FINER
    tile, target = offset(pointer(scores), group.places[t]), offset(pointer(mask), group.places[t])
    factor, other_factor = factors[UP * LANES + t], factors[(UP + 1) * LANES + t] * 2.0**FINER
    if mend(tile, absolute, target, columns, n, m, factor, other_factor, afresh, work) == IMPOSSIBLE:
        return IMPOSSIBLE
    if CERTIFY:
        objective, over = weigh_block(tile, absolute, columns, m, work)
        excess = over * 2.0**-SCORE_BITS * factors[DOWN * LANES + t] * factors[(DOWN + 1) * LANES + t]
        add_to(totals, objective, excess)
    totals[REPAIRED] += 1
    if len(duals) > 0:
        rows = offset(work.duals, lines)
        put_duals(rows, work.duals, 0, 1, 2.0**-SCORE_BITS, factors, t, duals[block])
    return 0


@compiled
def settle_queue(
    least: int,
    scores: Scores,
    absolute: bool,
    columns: int,
    n: int,
    m: int,
    waiting: int,
    mask: Mask,
    queue: Queue,
    work: Workspace,
    duals: DualArray,
    totals: npt.NDArray[np.float64],
) -> int:
    """Settle what waits in the queue, if it is `least` or more; returns what waits now, or IMPOSSIBLE."""
    if waiting < least:
        return waiting
    repaired = settle(pointer(scores), absolute, columns, n, m, waiting, pointer(mask), queue, work)
    if repaired == IMPOSSIBLE:
        return IMPOSSIBLE
    totals[REPAIRED] += repaired
    for t in range(waiting):
        add_to(totals, queue.sums[0, t], queue.sums[1, t])
        if len(duals) > 0:
            u, v, factors = pointer(queue.exact_u), pointer(queue.exact_v), pointer(queue.factors)
            put_duals(u, v, t, LANES, 2.0**-SCORE_BITS, factors, t, duals[queue.blocks[t]])
    return 0


@compiled
def add_to(totals: npt.NDArray[np.float64], objective: float, excess: float) -> None:
    """Count one block."""
    totals[OBJECTIVE] += objective
    totals[EXCESS] += excess
    if excess > 0.0:
        totals[WORST_GAP] = max(totals[WORST_GAP], excess / (objective + excess))


@compiled
def start_duals(warm: DualArray, block: int, used: int, factors: Pointer, m: int, v: Pointer) -> None:
    """Start v [m, LANES] from the column duals warm[block + t, 1], given in the unit of the scores, or from 0.

    Idle lanes repeat the last block, duals included: they write to the same place of the mask.
    """
    for k in range(m):
        store(v, k, spread(np.int32(0)))
    if len(warm) > 0:
        for t in range(LANES):
            for k in range(m):
                dual = warm[block + min(t, used - 1), 1, k] * factors[UP * LANES + t] * factors[(UP + 1) * LANES + t]
                v[k * LANES + t] = int(min(max(dual, -LIMIT), LIMIT))


@compiled
def put_duals(
    u: Pointer, v: Pointer, first: int, step: int, own_unit: float, factors: Pointer, t: int, duals: DualArray
) -> None:
    """Write u, v [m], every step-th from `first` on, which count in own_unit, to duals [2, m] in the scores' unit."""
    one_factor, other_factor = factors[DOWN * LANES + t], factors[(DOWN + 1) * LANES + t]
    for k in range(duals.shape[1]):
        duals[0, k] = u[first + k * step] * own_unit * one_factor * other_factor
        duals[1, k] = v[first + k * step] * own_unit * one_factor * other_factor
