"""Blocks that the dual passes leave in doubt, LANES of them at a time: prices prove their masks, or paths mend them.

Most of what is in doubt is only tied. So the first guess is the mask that the dual passes saw, with its tie terms large
enough to be seen; `price` looks for duals that prove it, and only a block whose columns do not hold n needs paths.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tsenor_cli.kernels.compilation import compiled
from tsenor_cli.kernels.contract import CERTIFY, Pointer, Untyped
from tsenor_cli.kernels.groups import DOWN, Q_BITS, UP, gather, quantise, scatter
from tsenor_cli.kernels.lanes import (
    LANES,
    as_bits,
    as_count,
    as_float,
    as_float64,
    as_int64,
    bits,
    first_bit,
    from_bits,
    from_mask,
    lanes,
    larger,
    load,
    offset,
    pointer,
    smaller,
    spread,
    store,
    where,
)
from tsenor_cli.kernels.mend import mend
from tsenor_cli.kernels.repair import IMPOSSIBLE, NEVER, Workspace
from tsenor_cli.kernels.ties import SCORE_BITS

VISIBLE_SHIFT = 15  # the dual passes see the upper TIE_BITS - 15 bits of a tie term
FINER = SCORE_BITS - Q_BITS  # bits by which w sees more than the dual passes
SWEEPS = 12  # of `price`: enough where it can succeed at all
NOTICEABLE = 1e-9  # a gap that is worth the search for better duals


class Queue(NamedTuple):
    """Blocks that wait to be settled together, and the scratch for it."""

    blocks: Untyped  # [LANES] int64, their numbers
    places: Untyped  # [LANES] int64, see groups.py
    u: Untyped  # [m, LANES] int32, their duals
    v: Untyped  # [m, LANES] int32
    raw: Untyped  # [m * m, LANES] of the scores' type
    q: Untyped  # [m * m, LANES] int32
    w: Untyped  # [m * m, LANES] int64
    kept: Untyped  # [m * m, LANES] uint8
    exact_u: Untyped  # [m, LANES] int64
    exact_v: Untyped  # [m, LANES] int64
    tied_u: Untyped  # [m, LANES] int64, those of the scores with their tie terms
    tied_v: Untyped  # [m, LANES] int64
    factors: Untyped  # [4, LANES] float64
    sums: Untyped  # [2, LANES] float64, see weigh
    ties: Untyped  # [m * m] int64
    visible: Untyped  # [m * m] int32


def queue(dtype: np.dtype[Any], ties: npt.NDArray[np.int64]) -> Queue:
    """Allocate a Queue for blocks of m of scores of `dtype`, with the tie terms `ties` [m, m]."""
    m = len(ties)
    return Queue(
        blocks=np.zeros(LANES, np.int64),
        places=np.zeros(LANES, np.int64),
        u=lanes(m, np.int32),
        v=lanes(m, np.int32),
        raw=lanes(m * m, dtype),
        q=lanes(m * m, np.int32),
        w=lanes(m * m, np.int64),
        kept=lanes(m * m, np.uint8),
        exact_u=lanes(m, np.int64),
        exact_v=lanes(m, np.int64),
        tied_u=lanes(m, np.int64),
        tied_v=lanes(m, np.int64),
        factors=lanes(4, np.float64),
        sums=lanes(2, np.float64),
        ties=ties.reshape(-1),
        visible=(ties.reshape(-1) >> VISIBLE_SHIFT).astype(np.int32),
    )


@compiled
def put_in_queue(queue: Queue, waiting: int, block: int, place: int, u: Pointer, v: Pointer, t: int, m: int) -> None:
    """Let the block of lane t wait in lane `waiting`."""
    queue.blocks[waiting], queue.places[waiting] = block, place
    queue_u, queue_v = pointer(queue.u), pointer(queue.v)
    for k in range(m):
        queue_u[k * LANES + waiting], queue_v[k * LANES + waiting] = u[k * LANES + t], v[k * LANES + t]


@compiled
def settle(
    scores: Pointer,
    absolute: bool,
    columns: int,
    n: int,
    m: int,
    waiting: int,
    mask: Pointer,
    queue: Queue,
    work: Workspace,
) -> int:
    """Find the best masks of the first `waiting` blocks of the queue; returns how many needed paths, or IMPOSSIBLE.

    Fills their tiles of the mask; queue.exact_u and exact_v have optimal duals, and queue.sums what they prove.
    """
    raw, q, w, kept = pointer(queue.raw), pointer(queue.q), pointer(queue.w), pointer(queue.kept)
    u, v, ties, factors = pointer(queue.exact_u), pointer(queue.exact_v), pointer(queue.ties), pointer(queue.factors)
    places, last = pointer(queue.places), waiting - 1
    for lane in range(waiting, LANES):  # idle lanes repeat the last block
        put_in_queue(queue, lane, queue.blocks[last], places[last], pointer(queue.u), pointer(queue.v), last, m)
    gather(scores, columns, m, places, raw)
    quantise(raw, absolute, pointer(queue.visible), m, q, factors)
    exact_scores(raw, absolute, factors, ties, m, w)
    unproven = guess(q, pointer(queue.u), pointer(queue.v), n, m, kept)
    for k in range(m):
        store(v, k, as_int64(load(pointer(queue.v), k)) << spread(FINER))
    unproven |= ~price(w, kept, m, u, v)
    uneven = (unproven | uneven_columns(kept, n, m)) & ((1 << waiting) - 1)
    scatter(kept, columns, m, places, mask)
    repaired = mend_lanes(scores, absolute, columns, n, m, uneven, unproven, mask, queue, work)
    if repaired != IMPOSSIBLE and CERTIFY:
        gather(mask, columns, m, places, kept)
        if weigh(raw, absolute, w, ties, kept, m, u, v, factors, pointer(queue.sums)):
            without_ties(w, kept, ties, m, u, v, pointer(queue.tied_u), pointer(queue.tied_v))
            weigh(raw, absolute, w, ties, kept, m, u, v, factors, pointer(queue.sums))
    return int(repaired)


@compiled
def mend_lanes(
    scores: Pointer,
    absolute: bool,
    columns: int,
    n: int,
    m: int,
    uneven: int,
    unproven: int,
    mask: Pointer,
    queue: Queue,
    work: Workspace,
) -> int:
    """Mend the lanes in `uneven`, afresh where `unproven`; return how many of them took paths, or IMPOSSIBLE."""
    u, v, factors, repaired = pointer(queue.exact_u), pointer(queue.exact_v), pointer(queue.factors), 0
    rows = offset(work.duals, -(-m // LANES) * LANES)
    while uneven:
        t = first_bit(uneven)
        uneven &= uneven - 1
        for k in range(m):
            work.duals[k], rows[k] = v[k * LANES + t], u[k * LANES + t]
        paths = mend(
            offset(scores, queue.places[t]),
            absolute,
            offset(mask, queue.places[t]),
            columns,
            n,
            m,
            factors[UP * LANES + t],
            factors[(UP + 1) * LANES + t] * 2.0**FINER,
            (unproven >> t) & 1 != 0,
            work,
        )
        if paths == IMPOSSIBLE:
            return IMPOSSIBLE
        repaired += paths > 0
        for k in range(m):
            v[k * LANES + t], u[k * LANES + t] = work.duals[k], rows[k]
    return repaired


@compiled
def guess(q: Pointer, u: Pointer, v: Pointer, n: int, m: int, kept: Pointer) -> int:
    """Keep what the dual passes would, n in every row; return the lanes, as bits, where that is not possible.

    Where the n-th and the (n+1)-th are equal even with their tie terms, the first in cyclic order is kept.
    """
    wanted, wrong = spread(np.uint8(n)), 0
    for i in range(m):
        u_row, along_row = load(u, i), spread(np.uint8(0))
        for j in range(m):
            above = as_count(load(q, i * m + j) > u_row + load(v, j))
            store(kept, i * m + j, above)
            along_row = along_row + above
        if bits(along_row != wanted) != 0:
            for step in range(m):
                j = i + step if i + step < m else i + step - m
                tied = as_count((load(q, i * m + j) == u_row + load(v, j)) & (wanted > along_row))
                store(kept, i * m + j, load(kept, i * m + j) + tied)
                along_row = along_row + tied
        wrong |= int(bits(along_row != wanted))
    return wrong


@compiled
def exact_scores(raw: Pointer, absolute: bool, factors: Pointer, ties: Pointer, m: int, w: Pointer) -> None:
    """Compute w = floor(|raw| · 2^(SCORE_BITS - e)) + ties, int64 [m * m, LANES]; see quantise for e."""
    one_factor, other_factor = load(factors, UP), load(factors, UP + 1) * spread(2.0**FINER)
    for k in range(m * m):
        score = as_float64(as_float(from_bits(as_bits(load(raw, k), absolute), load(raw, k))))
        store(w, k, as_int64(score * one_factor * other_factor) + spread(ties[k]))


@compiled
def price(w: Pointer, kept: Pointer, m: int, u: Pointer, v: Pointer) -> int:
    """Find duals for which `kept` is best among the masks with its row and column counts; return where there are such.

    The lanes are bits. Bellman and Ford's method: every u as small as its row allows, then every v lowered as far as
    its column asks. It starts from v that are nearly right, so it settles in a few sweeps, or is given up.
    """
    nothing, settled = spread(np.uint8(0)), 0
    for _ in range(SWEEPS):
        for i in range(m):
            largest = spread(-NEVER)
            for j in range(m):
                x = load(w, i * m + j) - load(v, j)
                largest = larger(largest, where(load(kept, i * m + j) == nothing, x, spread(-NEVER)))
            store(u, i, largest)
        lowered = 0
        for j in range(m):
            least = load(v, j)
            for i in range(m):
                x = load(w, i * m + j) - load(u, i)
                least = smaller(least, where(load(kept, i * m + j) == nothing, spread(NEVER), x))
            lowered |= int(bits(load(v, j) > least))
            store(v, j, least)
        settled = ~lowered & ((1 << LANES) - 1)
        if lowered == 0:
            break
    return settled


@compiled
def uneven_columns(kept: Pointer, n: int, m: int) -> int:
    """The lanes, as bits, where a column does not hold n."""
    wrong = 0
    for j in range(m):
        count = spread(np.uint8(0))
        for i in range(m):
            count = count + load(kept, i * m + j)
        wrong |= int(bits(count != spread(np.uint8(n))))
    return wrong


@compiled
def without_ties(
    w: Pointer, kept: Pointer, ties: Pointer, m: int, u: Pointer, v: Pointer, tied_u: Pointer, tied_v: Pointer
) -> None:
    """Replace u, v by duals of w without its tie terms, in the lanes where `kept` has such.

    They are missing only where tie terms, 2^-32 of the largest score, have outweighed a difference between scores.
    """
    for k in range(m * m):
        store(w, k, load(w, k) - spread(ties[k]))
    for k in range(m):
        store(tied_u, k, load(u, k))
        store(tied_v, k, load(v, k))
    settled = from_mask(price(w, kept, m, u, v))
    for k in range(m):
        store(u, k, where(settled, load(u, k), load(tied_u, k)))
        store(v, k, where(settled, load(v, k), load(tied_v, k)))
    for k in range(m * m):
        store(w, k, load(w, k) + spread(ties[k]))


@compiled
def weigh(
    raw: Pointer,
    absolute: bool,
    w: Pointer,
    ties: Pointer,
    kept: Pointer,
    m: int,
    u: Pointer,
    v: Pointer,
    factors: Pointer,
    sums: Pointer,
) -> bool:
    """Compute sums [2, LANES], Σ of the kept scores and dual value - primal value; is the second noticeable anywhere?

    It (docs/mathematics.md, eq. 4) is of the scores without their tie terms: a sum of terms ≥ 0, and 0 if optimal.
    """
    total, over, nothing = spread(0.0), spread(0.0), spread(np.uint8(0))
    for i in range(m):
        for j in range(m):
            k = i * m + j
            without = load(kept, k) == nothing
            score = as_float64(as_float(from_bits(as_bits(load(raw, k), absolute), load(raw, k))))
            total = total + where(without, spread(0.0), score)
            reduced = load(w, k) - spread(ties[k]) - load(u, i) - load(v, j)
            # In float64: where prices are far from good, m² of these terms are more than int64 holds.
            over = over + as_float64(larger(where(without, reduced, spread(0) - reduced), spread(0)))
    excess = over * spread(2.0**-SCORE_BITS) * load(factors, DOWN) * load(factors, DOWN + 1)
    store(sums, 0, total)
    store(sums, 1, excess)
    return bool(bits(excess > spread(NOTICEABLE) * total) != 0)
