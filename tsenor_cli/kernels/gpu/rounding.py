"""Algorithm 2 of the TSENOR paper (arXiv 2505.23949), greedy selection and local search, on the blocks of a tile.

kernels/rounding.py says why to take all entries that are the largest open ones of their row and of their column, round
by round, is the paper's sequential selection. The state of an entry is its key: at least 0 while open.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tsenor_cli.kernels.gpu.tile import block_max, column_max, column_sum, largest_of_all, row_max, row_sum

POWER_LIMIT = tl.constexpr(400.0)  # log2 P is told apart between ± this
CLOSED, TAKEN = tl.constexpr(-1), tl.constexpr(-2)  # shut out; kept
NO_BEST = tl.constexpr(-3)  # of a row where all is closed: differs from every key
INT_MAX = tl.constexpr(2147483647)
# Gains in units of q, which is below 2^27. A possible exchange gains more than LEAST_GAIN, one that is not less; adding
# a unit where that is possible counts for more than any exchange.
NEVER, LEAST_GAIN, PREFERRED = tl.constexpr(-3 << 28), tl.constexpr(-3 << 27), tl.constexpr(3 << 28)
BEYOND = tl.constexpr(1 << 20)  # more than any number of a line or of an entry


@triton.jit
def make_keys(power, row, column, M: tl.constexpr, SIDE: tl.constexpr):
    """Order the entries by log2 P, int32 [L, RI, CI]; returns also the least key of an entry with S = 1.

    Of equal ones those on the diagonal i + j ≡ 0 (mod m) come first, then those on the next: where all are equal, what
    is taken first is a mask. No two entries of a block share a key, else two could be taken for one. What is not of the
    block is closed.
    """
    SCALE: tl.constexpr = (1 << 30) // (SIDE * SIDE)
    power = tl.minimum(tl.maximum(power, -0.999 * POWER_LIMIT), 0.999 * POWER_LIMIT) + POWER_LIMIT
    order = (power * (SCALE / POWER_LIMIT)).to(tl.int32) * (SIDE * SIDE)
    key = order + (SIDE * SIDE - 1 - (((row + column) % M) * SIDE + row))
    if M < SIDE:
        key = tl.where((row < M) & (column < M), key, CLOSED)
    return key, SCALE * (SIDE * SIDE)


@triton.jit
def greedy(key, least_full, row, column, n, M: tl.constexpr, SIDE: tl.constexpr, RO: tl.constexpr, CO: tl.constexpr):
    """Take entries in the order of their keys while their row and their column hold fewer than n (Alg. 2, greedy).

    Returns the keys, TAKEN where kept, and how many more each row and each column could hold. Keys of at least
    `least_full` are taken at once where they fit: they come first, so none is shut out.
    """
    full = (key >= least_full).to(tl.int32)
    in_rows, in_columns = row_sum(full, RO, CO), column_sum(full, RO, CO)
    # One vector, then the other: a block reduction of vectors alone crashed the layout passes of Triton 3.6.
    most = column_max(tl.maximum(in_rows, in_columns), RO, CO)
    over = row_max((most > n).to(tl.int32), RO, CO)
    over = column_max(tl.maximum(over, (in_rows > n).to(tl.int32)), RO, CO)
    over = row_max(over, RO, CO)
    full = (key >= tl.where(over == 0, least_full, INT_MAX)).to(tl.int32)
    row_room = n - row_sum(full, RO, CO)
    column_room = n - column_sum(full, RO, CO)
    if M < SIDE:
        row_room = tl.where(row < M, row_room, 0)
        column_room = tl.where(column < M, column_room, 0)
    key = close(tl.where(full != 0, TAKEN, key), row_room, column_room)
    best = row_max(key, RO, CO)
    while largest_of_all(best) > CLOSED:
        taken = tl.where(best > CLOSED, best, NO_BEST) == column_max(key, RO, CO)
        one = taken.to(tl.int32)
        row_room -= row_sum(one, RO, CO)
        column_room -= column_sum(one, RO, CO)
        key = close(tl.where(taken, TAKEN, key), row_room, column_room)
        best = row_max(key, RO, CO)
    return key, row_room, column_room


@triton.jit
def close(key, row_room, column_room):
    """Close the entries of lines without room; what is taken stays so."""
    key = tl.minimum(key, tl.where(row_room == 0, CLOSED, INT_MAX))
    return tl.minimum(key, tl.where(column_room == 0, CLOSED, INT_MAX))


@triton.jit
def local_search(
    z, row_room, column_room, row, column, n, by_gain, M: tl.constexpr, RO: tl.constexpr, CO: tl.constexpr
):
    """Fill the rows and columns that hold fewer than n, one unit of every block at a time, as in kernels/rounding.py.

    z [L, RI, CI] int32 is the score q of an entry that is free, and ~q, negative, of one that is kept: to keep or to
    give up an entry is to flip its bits. Returns z of the filled mask.
    """
    SIDE: tl.constexpr = CO * z.shape[2]
    step = 0
    while (largest_of_all(row_room) > 0) & (step < n * M):
        score = z >> tl.where(step < by_gain, 0, 31)  # without gains, 0 and ~0
        i = -column_max(tl.where(row_room > 0, -row, -BEYOND), RO, CO)  # the first with room
        j = -row_max(tl.where(column_room > 0, -column, -BEYOND), RO, CO)
        in_row = column_max(tl.where(row == i, score, NEVER), RO, CO)
        in_column = row_max(tl.where(column == j, score, NEVER), RO, CO)
        # Negative is what is kept, and cannot be taken once more. Gains of exchanges are one too small, all of them.
        exchange = score + tl.where(in_row < 0, NEVER, in_row) + tl.where(in_column < 0, NEVER, in_column)
        bonus = tl.minimum(tl.where(row_room > 0, PREFERRED, NEVER), tl.where(column_room > 0, PREFERRED, NEVER))
        gain = tl.where(score < 0, exchange, score + bonus)
        most = block_max(gain, RO, CO)
        first = -block_max(tl.where(gain == most, -(row * SIDE + column), -BEYOND), RO, CO)
        possible = (most > LEAST_GAIN) & (i < BEYOND)
        at_row, at_column = tl.where(possible, first // SIDE, BEYOND), first % SIDE
        add = most >= PREFERRED
        i, j = tl.where(add, at_row, i), tl.where(add, at_column, j)
        i = tl.where(possible, i, BEYOND)
        # An addition flips (i, j), an exchange (i, at_column), (at_row, j) and (at_row, at_column).
        of_row, of_at_row = -(row == i).to(tl.int32), -(row == at_row).to(tl.int32)
        of_column, of_at_column = -(column == j).to(tl.int32), -(column == at_column).to(tl.int32)
        z ^= ((of_row | of_at_row) & of_at_column) | (of_at_row & of_column)
        row_room += of_row
        column_room += tl.where(possible, of_column, 0)
        step += 1
    return z
