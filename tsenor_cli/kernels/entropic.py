"""The pipeline of the TSENOR paper (arXiv 2505.23949) on a CPU: Dykstra's projections, greedy rounding, local search.

Its masks are feasible but not optimal; how far they may be from it is certified like those of the exact solver, with
the duals that the iteration ends with.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tsenor_cli.kernels.compilation import compiled, compiling
from tsenor_cli.kernels.contract import Mask, Scores, Tally, Untyped, UnusableScoresError, exact_sum
from tsenor_cli.kernels.dykstra import ITERATIONS, T, Transport, dykstra, transport, transport_pointers
from tsenor_cli.kernels.groups import find_places, gather, quantise, scatter
from tsenor_cli.kernels.lanes import (
    LANES,
    as_int32,
    as_int64,
    lanes,
    larger,
    load,
    pointer,
    smaller,
    spread,
    store,
)
from tsenor_cli.kernels.passes import LIMIT, Ahead, call_dual_passes, dual_passes_address
from tsenor_cli.kernels.rounding import Selection, greedy, local_search, make_keys, selection, selection_pointers
from tsenor_cli.kernels.schedule import DEFAULT_ITERATIONS
from tsenor_cli.kernels.settle import FINER, VISIBLE_SHIFT, exact_scores, weigh
from tsenor_cli.kernels.threads import CHUNK_SCORES, over_chunks
from tsenor_cli.kernels.ties import tie_table

# What the compiled code adds up, [chunks, 5] float64.
OBJECTIVE, EXCESS, WORST_GAP, MOST, UNMET = range(5)


def solve_entropic(
    scores: Scores,
    n: int,
    m: int,
    mask: Mask,
    *,
    tau: float | None = None,
    iterations: int | None = None,
    local_search: int | None = None,
    absolute: bool = False,
) -> Tally:
    """Fill `mask` with a good transposable n:m mask of `scores`; see contract.py.

    `tau` is the last τ times the largest score of a block; None chooses it for every block. `iterations` is the most of
    a block; None is DEFAULT_ITERATIONS. `local_search` is how many units of a block are placed by gain; None is all.

    Raises:
        UnusableScoresError: see contract.py.
    """
    solve_groups, dual_passes = _compile(scores.dtype, m, n)
    blocks = scores.size // (m * m)
    groups = -(-blocks // LANES)
    size = max(1, CHUNK_SCORES // (m * m * LANES))
    statistics = np.zeros((-(-groups // size), 5))
    settings = (
        0.0 if tau is None else float(tau),
        DEFAULT_ITERATIONS if iterations is None else iterations,
        n * m if local_search is None else local_search,
    )

    def chunk(first: int, last: int, scratch: _Scratch) -> None:
        totals = statistics[first // size]
        if not solve_groups(
            scores, absolute, n, m, dual_passes, settings, first, last, mask.view(np.uint8), totals, *scratch
        ):
            raise UnusableScoresError

    over_chunks(chunk, groups, size, (("entropic", scores.dtype, n, m), lambda: _scratch(scores.dtype, n, m)))
    return Tally(
        objective=exact_sum(statistics[:, OBJECTIVE]),
        excess=exact_sum(statistics[:, EXCESS]),
        worst_gap=float(statistics[:, WORST_GAP].max(initial=0.0)),
        repaired=0,
        iterations=int(statistics[:, MOST].max(initial=0.0)),
        unconverged=int(statistics[:, UNMET].sum()),
    )


class _Group(NamedTuple):
    """LANES blocks before and after."""

    places: Untyped  # [LANES] int64, see groups.py
    raw: Untyped  # [m * m, LANES] of the scores' type
    q: Untyped  # [m * m, LANES] int32
    w: Untyped  # [m * m, LANES] int64
    u: Untyped  # [m, LANES] int32
    v: Untyped  # [m, LANES] int32
    exact_u: Untyped  # [m, LANES] int64
    exact_v: Untyped  # [m, LANES] int64
    factors: Untyped  # [4, LANES] float64
    sums: Untyped  # [2, LANES] float64, see weigh
    ties: Untyped  # [m * m] int32, what q has of the tie terms
    no_ties: Untyped  # [m * m] int64


_Scratch = tuple[_Group, Transport, Selection]


def _scratch(dtype: np.dtype[Any], n: int, m: int) -> _Scratch:
    group = _Group(
        places=np.zeros(LANES, np.int64),
        raw=lanes(m * m, dtype),
        q=lanes(m * m, np.int32),
        w=lanes(m * m, np.int64),
        u=lanes(m, np.int32),
        v=lanes(m, np.int32),
        exact_u=lanes(m, np.int64),
        exact_v=lanes(m, np.int64),
        factors=lanes(4, np.float64),
        sums=lanes(2, np.float64),
        ties=(tie_table(n, m).reshape(-1) >> VISIBLE_SHIFT).astype(np.int32),
        no_ties=np.zeros(m * m, np.int64),
    )
    return group, transport(m), selection(m)


@cache
def _compile(dtype: np.dtype[Any], m: int, n: int) -> tuple[Untyped, int]:
    """Everything that runs for this dtype and pattern, compiled or loaded by a call that has nothing to do."""
    nothing, no_mask = np.empty((0, m), dtype), np.empty((0, m), np.uint8)
    with compiling():
        address = dual_passes_address(m, n)
        _solve_groups(nothing, False, n, m, address, (0.0, 1, 1), 0, 0, no_mask, np.empty(5), *_scratch(dtype, n, m))
    return _solve_groups, address


@compiled
def _solve_groups(
    scores: Scores,
    absolute: bool,
    n: int,
    m: int,
    dual_passes: int,
    settings: tuple[float, int, int],
    first: int,
    last: int,
    mask: Mask,
    totals: npt.NDArray[np.float64],
    group: _Group,
    transport: Transport,
    selection: Selection,
) -> bool:
    """Solve groups first .. last-1 and add to totals [5]; False if a score is unusable."""
    columns, blocks = scores.shape[1], scores.size // (m * m)
    moved, chosen = transport_pointers(transport), selection_pointers(selection)
    tau, most, by_gain = settings
    q, places = pointer(group.q), pointer(group.places)
    for number in range(first, last):
        block, used = number * LANES, min(LANES, blocks - number * LANES)
        find_places(block, used, columns, m, places)
        gather(pointer(scores), columns, m, places, pointer(group.raw))
        if not quantise(pointer(group.raw), absolute, pointer(group.ties), m, q, pointer(group.factors)):
            return False
        met = dykstra(q, n, m, tau, most, moved)
        greedy(n, m, make_keys(q, m, moved, chosen), chosen)
        local_search(q, m, by_gain, chosen)
        scatter(chosen.kept, columns, m, places, pointer(mask))
        certify(absolute, dual_passes, m, moved, chosen, group)
        for t in range(used):
            objective = group.sums[0, t]
            excess = group.sums[1, t]
            totals[OBJECTIVE] += objective
            totals[EXCESS] += excess
            if excess > 0.0:
                totals[WORST_GAP] = max(totals[WORST_GAP], excess / (objective + excess))
            totals[MOST] = max(totals[MOST], transport.state[ITERATIONS, t])
            totals[UNMET] += (met >> t) & 1 == 0
    return True


@compiled
def certify(absolute: bool, dual_passes: int, m: int, moved: Transport, chosen: Selection, group: _Group) -> None:
    """What the column potentials prove, with the best row duals for them: group.sums, see weigh."""
    u, v = pointer(group.u), pointer(group.v)
    limit, scale = spread(np.float32(LIMIT)), spread(np.float32(-1.0)) / load(moved.state, T)
    for k in range(m):
        dual = smaller(larger(load(moved.v, k) * scale, spread(np.float32(-LIMIT))), limit)
        store(v, k, as_int32(dual))
    call_dual_passes(dual_passes, pointer(group.q), u, v, 1, 0, Ahead(0, 0, 0))
    for k in range(m):
        store(pointer(group.exact_u), k, as_int64(load(u, k)) << spread(FINER))
        store(pointer(group.exact_v), k, as_int64(load(v, k)) << spread(FINER))
    w, raw, no_ties, factors = pointer(group.w), pointer(group.raw), pointer(group.no_ties), pointer(group.factors)
    exact_scores(raw, absolute, factors, no_ties, m, w)
    exact_u, exact_v = pointer(group.exact_u), pointer(group.exact_v)
    weigh(raw, absolute, w, no_ties, chosen.kept, m, exact_u, exact_v, factors, pointer(group.sums))
