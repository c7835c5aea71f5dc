"""What is done to LANES blocks at a time: from the matrix into lanes, to integers, what to keep, and back.

Entry (i, j) of the blocks is row i * m + j of an array [m * m, LANES]; places [LANES] says where in the matrix their
first entries are.
"""

from __future__ import annotations

import numpy as np

from tsenor_cli.kernels.compilation import compiled
from tsenor_cli.kernels.contract import CERTIFY, Pointer, Untyped
from tsenor_cli.kernels.lanes import (
    LANES,
    as_bits,
    as_count,
    as_float,
    as_float64,
    as_int32,
    bits,
    from_bits,
    from_mask,
    infinity_bits,
    larger,
    largest_of,
    load,
    match,
    offset,
    smaller,
    smallest_of,
    spread,
    store,
    where,
)
from tsenor_cli.kernels.transpose import put_columns, take_columns

FEW = 4  # rows
Q_BITS = 28  # scores in the dual passes are integers below 2^28
UP, DOWN = 0, 2  # rows of `factors`, see quantise


@compiled
def find_places(block: int, used: int, columns: int, m: int, places: Pointer) -> None:
    """The places of blocks block .. block+used-1, counted row by row of tiles; the other lanes repeat the last one."""
    across = columns // m
    tile_row, tile = block // across, block % across
    if used == LANES and tile + LANES <= across:  # side by side, as most are: no branch per lane
        for t in range(LANES):
            places[t] = (tile_row * columns + tile + t) * m
        return
    for t in range(LANES):
        places[t] = (tile_row * columns + tile) * m
        if t < used - 1:
            tile += 1
            if tile == across:
                tile_row, tile = tile_row + 1, 0


@compiled
def gather(scores: Pointer, columns: int, m: int, places: Pointer, raw: Pointer) -> None:
    """Bring blocks of scores [rows, columns] into the lanes of raw [m * m, LANES]."""
    for i in range(m):
        gather_line(offset(scores, i * columns), m, places, offset(raw, i * m * LANES))


@compiled
def scatter(kept: Pointer, columns: int, m: int, places: Pointer, mask: Pointer) -> None:
    """Write the lanes of kept [m * m, LANES] to their blocks of mask [rows, columns]: the way back of `gather`."""
    for i in range(m):
        scatter_line(offset(kept, i * m * LANES), m, places, offset(mask, i * columns))


@compiled
def gather_line(scores: Pointer, m: int, places: Pointer, raw: Pointer) -> None:
    """Bring one line of m scores of every block into raw [m, LANES], as many at a time as the width of a shuffle."""
    if m % 16 == 0:
        for j in range(0, m, 16):
            take_columns(offset(scores, j), places, raw, j, 16)
    elif m % 8 == 0:
        for j in range(0, m, 8):
            take_columns(offset(scores, j), places, raw, j, 8)
    elif m % 4 == 0:
        for j in range(0, m, 4):
            take_columns(offset(scores, j), places, raw, j, 4)
    elif m % 2 == 0:
        for j in range(0, m, 2):
            take_columns(offset(scores, j), places, raw, j, 2)
    else:
        for j in range(m):
            take_columns(offset(scores, j), places, raw, j, 1)


@compiled
def scatter_line(kept: Pointer, m: int, places: Pointer, mask: Pointer) -> None:
    """Write one line of kept [m, LANES] back."""
    if m % 16 == 0:
        for j in range(0, m, 16):
            put_columns(kept, j, offset(mask, j), places, 16)
    elif m % 8 == 0:
        for j in range(0, m, 8):
            put_columns(kept, j, offset(mask, j), places, 8)
    elif m % 4 == 0:
        for j in range(0, m, 4):
            put_columns(kept, j, offset(mask, j), places, 4)
    elif m % 2 == 0:
        for j in range(0, m, 2):
            put_columns(kept, j, offset(mask, j), places, 2)
    else:
        for j in range(m):
            put_columns(kept, j, offset(mask, j), places, 1)


@compiled
def quantise(raw: Pointer, absolute: bool, ties: Pointer, m: int, q: Pointer, factors: Pointer) -> bool:
    """Compute q = floor(|raw| · 2^(Q_BITS - e)) + ties, with the largest score of each block in [2^(e-1), 2^e).

    Returns False if a score is unusable: not finite, or negative unless absolute. factors [4, LANES] gets
    2^(Q_BITS - e), then 2^e, each as a product of two (one alone might be infinite). The unit of a block of zeros is 0.
    """
    size = m * m
    highest = lowest = as_bits(load(raw, 0), absolute)
    for k in range(1, size):
        words = as_bits(load(raw, k), absolute)
        highest, lowest = larger(highest, words), smaller(lowest, words)
    if smallest_of(lowest) < 0 or largest_of(highest) >= infinity_bits(load(raw, 0)):
        return False
    store_factors(as_float64(as_float(from_bits(highest, load(raw, 0)))), factors)
    like = as_float(load(raw, 0))
    one_half, other_half = match(load(factors, UP), like), match(load(factors, UP + 1), like)
    for k in range(size):
        score = as_float(from_bits(as_bits(load(raw, k), absolute), load(raw, k)))
        store(q, k, as_int32(score * one_half * other_half) + spread(ties[k]))
    return True


@compiled
def store_factors(largest: Untyped, factors: Pointer) -> None:
    """Write the factors of blocks with these largest scores. A denormal float64 counts as 2^-1022: near enough."""
    zero, words = spread(0.0), as_bits(largest, False)
    e = where(largest > zero, (words >> spread(52)) - spread(1022), spread(0))
    store_power(spread(Q_BITS) - e, factors, UP)
    store_power(e, factors, DOWN)
    store(factors, DOWN, where(largest > zero, load(factors, DOWN), zero))


@compiled
def store_power(exponent: Untyped, factors: Pointer, row: int) -> None:
    """Write 2^exponent to factors[row] · factors[row + 1]."""
    half, bias, place = exponent >> spread(1), spread(1023), spread(52)
    store(factors, row, from_bits((half + bias) << place, load(factors, row)))
    store(factors, row + 1, from_bits((exponent - half + bias) << place, load(factors, row)))


@compiled
def keep(
    raw: Pointer,
    absolute: bool,
    ties: Pointer,
    q: Pointer,
    u: Pointer,
    v: Pointer,
    n: int,
    m: int,
    used: int,
    kept: Pointer,
    objective: Pointer,
    counts: Pointer,
) -> tuple[int, int, int]:
    """Keep what lies above the duals; return the lanes, as bits, that are uneven, doubtful, and tied.

    An optimum is proven by n in every row and column, and no score too near to its threshold u_i + v_j. As q is rounded
    down, a score above it is so by one or more; one below it by less than one might be lifted over it by its tie term.
    A row where one is too near, or that does not hold n, is in doubt. A lane with such a row is doubtful, with more
    than one in FEW also tied; a lane without, but with columns that do not hold n, is uneven.
    kept [m * m, LANES] gets 0 or 1. The kept scores of the proven blocks are added to objective [1, LANES], a running
    sum. counts [m, LANES] is scratch. Only `used` lanes count.
    """
    none, wanted, total, one = spread(np.uint8(0)), spread(np.uint8(n)), spread(0.0), spread(np.int32(1))
    for j in range(m):
        store(counts, j, none)
    doubtful_rows = none
    for i in range(m):
        below, along_row, near = load(u, i) - one, none, from_mask(0)
        for j in range(m):
            k = i * m + j
            beyond = load(q, k) - (below + load(v, j) + spread(ties[k]))  # 1 at the threshold
            above = beyond > one
            near = near | ((beyond | one) == one)
            count = as_count(above)
            store(kept, k, count)
            along_row = along_row + count
            store(counts, j, load(counts, j) + count)
            if CERTIFY:
                exact = as_float64(as_float(from_bits(as_bits(load(raw, k), absolute), load(raw, k))))
                total = total + where(above, exact, spread(0.0))
        doubtful_rows = doubtful_rows + as_count(near | (along_row != wanted))
    uneven = from_mask(0)
    for j in range(m):
        uneven = uneven | (load(counts, j) != wanted)
    busy, doubtful = (1 << used) - 1, int(bits(doubtful_rows > none))
    proven = from_mask(busy & ~doubtful & ~int(bits(uneven)))
    store(objective, 0, load(objective, 0) + where(proven, total, spread(0.0)))
    many = int(bits(doubtful_rows > spread(np.uint8(m // FEW))))
    return busy & ~doubtful & int(bits(uneven)), busy & doubtful, busy & many
