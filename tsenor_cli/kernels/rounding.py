"""Algorithm 2 of the TSENOR paper (arXiv 2505.23949), greedy selection and local search, on LANES blocks at a time.

The paper takes the entries of S one by one in descending order. An entry that is the largest open one of its row and of
its column is taken by that order before any other of theirs; so all such entries can be taken at once, and again what
is then largest, round by round, with the same result. Keys that no two entries of a block share give the order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tsenor_cli.kernels.compilation import compiled
from tsenor_cli.kernels.contract import Pointer, Untyped
from tsenor_cli.kernels.dykstra import T, Transport
from tsenor_cli.kernels.lanes import (
    as_count,
    as_float32,
    as_int32,
    bits,
    lanes,
    larger,
    load,
    pointer,
    smaller,
    spread,
    store,
    where,
)

KEY_BITS = 31
POWER_LIMIT = 400.0  # log2 P is told apart between ± this
CLOSED = np.int32(-1)
# Gains in units of q, below 2^28 and some tie terms: an exchange that is possible gains more than LEAST_GAIN, one that
# is not less; adding a unit where that is possible counts for more than any exchange.
NEVER, LEAST_GAIN, PREFERRED = np.int32(-3 << 28), np.int32(-3 << 27), np.int32(3 << 28)
NO_CHANGE, ADD, EXCHANGE = np.int32(0), np.int32(1), np.int32(2)


class Selection(NamedTuple):
    """The rounding of LANES blocks. In compiled code, pointers to it. int32 but for kept."""

    key: Untyped  # [m * m, LANES] ≥ 0, CLOSED when taken or shut out
    kept: Untyped  # [m * m, LANES] uint8, 0 or 1
    row_room: Untyped  # [m, LANES] how many a row still takes
    column_room: Untyped  # [m, LANES]
    row_best: Untyped  # [m, LANES]
    column_best: Untyped  # [m, LANES]


def selection(m: int) -> Selection:
    """Allocate a Selection for blocks of m."""
    return Selection(lanes(m * m, np.int32), lanes(m * m, np.uint8), *(lanes(m, np.int32) for _ in range(4)))


@compiled
def selection_pointers(work: Selection) -> Selection:
    """What the compiled functions below take."""
    return Selection(
        pointer(work.key),
        pointer(work.kept),
        pointer(work.row_room),
        pointer(work.column_room),
        pointer(work.row_best),
        pointer(work.column_best),
    )


@compiled
def index_bits(m: int) -> int:
    """How many bits the number of an entry takes."""
    count = 0
    while 1 << count < m * m:
        count += 1
    return count


@compiled
def make_keys(q: Pointer, m: int, work: Transport, chosen: Selection) -> int:
    """Order the entries by log2 P, of equal ones the lower index first; return the least key of an entry with S = 1."""
    low = index_bits(m)
    per_power = np.float32(2.0 ** (KEY_BITS - low - 1) / POWER_LIMIT)
    limit, shift = spread(np.float32(POWER_LIMIT * 0.999)), spread(np.float32(POWER_LIMIT))
    t = load(work.state, T)
    for i in range(m):
        for j in range(m):
            k = i * m + j
            power = t * as_float32(load(q, k)) + load(work.u, i) + load(work.v, j)
            power = larger(smaller(power, limit), spread(np.float32(0.0)) - limit) + shift
            order = as_int32(power * spread(per_power)) << spread(np.int32(low))
            store(chosen.key, k, order + spread(np.int32((1 << low) - 1 - k)))
    return int(int(np.float32(POWER_LIMIT) * per_power) << low)


@compiled
def greedy(n: int, m: int, least_full: int, chosen: Selection) -> None:
    """Take entries in the order of their keys while their row and their column hold fewer than n (Alg. 2, greedy)."""
    take_full(n, m, least_full, chosen)
    while find_best(m, chosen):
        for i in range(m):
            room, best = load(chosen.row_room, i), load(chosen.row_best, i)
            for j in range(m):
                k = i * m + j
                key = load(chosen.key, k)
                taken = (key > spread(CLOSED)) & (key == best) & (key == load(chosen.column_best, j))
                store(chosen.key, k, where(taken, spread(CLOSED), key))
                store(chosen.kept, k, load(chosen.kept, k) + as_count(taken))
                one = where(taken, spread(np.int32(1)), spread(np.int32(0)))
                room = room - one
                store(chosen.column_room, j, load(chosen.column_room, j) - one)
            store(chosen.row_room, i, room)


@compiled
def take_full(n: int, m: int, least_full: int, chosen: Selection) -> None:
    """Start with nothing, or with all entries with S = 1 where they fit: they come first, so none is shut out."""
    wanted, full = spread(np.int32(n)), spread(np.int32(least_full - 1))
    one, none = spread(np.int32(1)), spread(np.int32(0))
    for k in range(m):
        store(chosen.row_room, k, wanted)
        store(chosen.column_room, k, wanted)
    for i in range(m):
        for j in range(m):
            count = where(load(chosen.key, i * m + j) > full, one, none)
            store(chosen.row_room, i, load(chosen.row_room, i) - count)
            store(chosen.column_room, j, load(chosen.column_room, j) - count)
    least = wanted
    for k in range(m):
        least = smaller(least, smaller(load(chosen.row_room, k), load(chosen.column_room, k)))
    fits = least > spread(CLOSED)
    for k in range(m):
        store(chosen.row_room, k, where(fits, load(chosen.row_room, k), wanted))
        store(chosen.column_room, k, where(fits, load(chosen.column_room, k), wanted))
    for k in range(m * m):
        key = load(chosen.key, k)
        taken = fits & (key > full)
        store(chosen.kept, k, as_count(taken))
        store(chosen.key, k, where(taken, spread(CLOSED), key))


@compiled
def find_best(m: int, chosen: Selection) -> bool:
    """Close what has no room, and find the largest open key of every line; False if all are closed."""
    none, closed, any_open = spread(np.int32(0)), spread(CLOSED), np.uint16(0)
    for j in range(m):
        store(chosen.column_best, j, closed)
    for i in range(m):
        best, room = closed, load(chosen.row_room, i) > none
        for j in range(m):
            k = i * m + j
            key = where(room & (load(chosen.column_room, j) > none), load(chosen.key, k), closed)
            store(chosen.key, k, key)
            best = larger(best, key)
            store(chosen.column_best, j, larger(load(chosen.column_best, j), key))
        store(chosen.row_best, i, best)
        any_open |= bits(best > closed)
    return bool(any_open != 0)


@compiled
def local_search(q: Pointer, m: int, most: int, chosen: Selection) -> None:
    """Fill the rows and columns that hold fewer than n, one unit at a time (Alg. 2, local search).

    A unit goes to an entry of a row and a column that both have room, if one of them is not kept. Else, for the first
    row i and the first column j with room, a kept (i', j') is given up for (i, j') and (i', j), neither of which was
    kept. One of both is always possible (docs/mathematics.md). The gain decides for `most` units, then the order.
    """
    step = 0
    while True:
        row, column = first_with_room(chosen.row_room, m), first_with_room(chosen.column_room, m)
        if bits(row > spread(CLOSED)) == 0:
            return
        weigh_exchanges(q, m, row, column, step < most, chosen)
        at_row, at_column, kind = best_change(q, m, row, step < most, chosen)
        change(m, row, column, at_row, at_column, kind, chosen)
        step += 1


@compiled
def first_with_room(room: Pointer, m: int) -> Untyped:
    """The number of the first line with room, or CLOSED."""
    first = spread(CLOSED)
    for k in range(m - 1, -1, -1):
        first = where(load(room, k) > spread(np.int32(0)), spread(np.int32(k)), first)
    return first


@compiled
def weigh_exchanges(q: Pointer, m: int, row: Untyped, column: Untyped, by_gain: bool, chosen: Selection) -> None:
    """column_best[j'] = the score of (row, j'), and row_best[i'] = that of (i', column); NEVER where it is kept."""
    never, nothing = spread(NEVER), spread(np.uint8(0))
    for k in range(m):
        store(chosen.row_best, k, never)
        store(chosen.column_best, k, never)
    for i in range(m):
        for j in range(m):
            score = load(q, i * m + j) if by_gain else spread(np.int32(0))
            free = load(chosen.kept, i * m + j) == nothing
            here = free & (row == spread(np.int32(i)))
            store(chosen.column_best, j, where(here, score, load(chosen.column_best, j)))
            here = free & (column == spread(np.int32(j)))
            store(chosen.row_best, i, where(here, score, load(chosen.row_best, i)))


@compiled
def best_change(q: Pointer, m: int, row: Untyped, by_gain: bool, chosen: Selection) -> tuple[Untyped, Untyped, Untyped]:
    """Where to add a unit, or else what to give up for two others: the place, and which of both."""
    nothing, best = spread(np.int32(0)), spread(LEAST_GAIN)
    at_row, at_column, kind = spread(CLOSED), spread(CLOSED), spread(NO_CHANGE)
    for i in range(m):
        row_room = load(chosen.row_room, i) > nothing
        for j in range(m):
            score = load(q, i * m + j) if by_gain else nothing
            exchange = load(chosen.row_best, i) + load(chosen.column_best, j) - score
            add = where(row_room & (load(chosen.column_room, j) > nothing), score + spread(PREFERRED), spread(NEVER))
            kept = load(chosen.kept, i * m + j) != spread(np.uint8(0))
            gain = where(kept, exchange, add)
            better = gain > best
            best = where(better, gain, best)
            at_row = where(better, spread(np.int32(i)), at_row)
            at_column = where(better, spread(np.int32(j)), at_column)
            kind = where(better, where(kept, spread(EXCHANGE), spread(ADD)), kind)
    return at_row, at_column, where(row > spread(CLOSED), kind, spread(NO_CHANGE))


@compiled
def change(
    m: int, row: Untyped, column: Untyped, at_row: Untyped, at_column: Untyped, kind: Untyped, chosen: Selection
) -> None:
    """Make the change in every lane."""
    add, exchange = kind == spread(ADD), kind == spread(EXCHANGE)
    row, column = where(exchange, row, at_row), where(exchange, column, at_column)  # whose room becomes smaller
    yes, no, one, none = spread(np.uint8(1)), spread(np.uint8(0)), spread(np.int32(1)), spread(np.int32(0))
    for i in range(m):
        number = spread(np.int32(i))
        for j in range(m):
            k, other = i * m + j, spread(np.int32(j))
            here = (at_row == number) & (at_column == other)
            gained = (add & here) | (
                exchange & (((row == number) & (at_column == other)) | ((at_row == number) & (column == other)))
            )
            kept = where(exchange & here, no, load(chosen.kept, k))
            store(chosen.kept, k, where(gained, yes, kept))
        changed = add | exchange
        store(chosen.row_room, i, load(chosen.row_room, i) - where(changed & (row == number), one, none))
        store(chosen.column_room, i, load(chosen.column_room, i) - where(changed & (column == number), one, none))
