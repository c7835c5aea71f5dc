"""The first kernel of the exact solver: 26 bits of every score, int32, and for most blocks a proof of all of them.

Prices by annealing, the n best of every row, paths for what is too much in a column (paths.py). Then u and v are moved
away from the scores: where all stay a unit of q away from their threshold, what the bits below may add cannot reach it,
and the mask is the only best one for w and for the scores (docs/mathematics.md, "A block whose counts are right is
done"). What is left goes to settle_kernel.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tsenor_cli.kernels.gpu.anneal import anneal
from tsenor_cli.kernels.gpu.paths import balance, swap, wrong_counts
from tsenor_cli.kernels.gpu.rows import write
from tsenor_cli.kernels.gpu.scores import read, read_again
from tsenor_cli.kernels.gpu.tile import (
    block_max,
    block_sum,
    blocks_of,
    column_max,
    column_min,
    columns_of,
    largest_of_all,
    offsets_of,
    row_max,
    row_min,
    rows_of,
)
from tsenor_cli.kernels.ties import TIE_BITS

Q_BITS = 26
Q_ONE = tl.constexpr(float(1 << Q_BITS))
VISIBLE_BITS = 7  # the upper bits of the tie terms, for a mask that is mostly right where scores are tied
HIDDEN = tl.constexpr(TIE_BITS - VISIBLE_BITS)
VISIBLE = tl.constexpr(1 << VISIBLE_BITS)
APART, FAR = tl.constexpr(1 << 30), tl.constexpr(1 << 28)  # see paths.py
LIMIT = tl.constexpr(float(1 << 27))  # of prices
TAKEN = tl.constexpr(-(1 << 31) + 1)
ROUNDING = tl.constexpr(16)  # units of q that float64 scores may lose on their way through float32

NUMBERS = ["blocks", "per_row", "stride", "n", "sharpness", "stages", "per_stage", "most", "tries"]
POINTERS = ["scores", "ties", "warm", "mask", "prices", "state", "objective", "duals"]


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def draft(
    scores,
    ties,
    warm,
    mask,
    prices,
    state,
    objective,
    duals,
    blocks,
    per_row,
    stride,
    n,
    sharpness,
    stages,
    per_stage,
    most,
    tries,
    M: tl.constexpr,
    RI: tl.constexpr,
    CI: tl.constexpr,
    RO: tl.constexpr,
    CO: tl.constexpr,
    L: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    WORDS: tl.constexpr,
    WARM: tl.constexpr,
    DUALS: tl.constexpr,
):
    """Solve this program's blocks; the numbers are those of `anneal`, `balance` and `centre`.

    ties int32 [SIDE, SIDE]; warm and duals float64 [blocks, 2, M]; prices int32 [blocks, SIDE], of the columns;
    state int32 [blocks] becomes 0 where proven, 1 where not, 2 more where a score is unusable; objective float64
    [blocks].
    """
    SIDE: tl.constexpr = RI * RO
    row, column, block = rows_of(L, RI, RO, CO), columns_of(L, CI, CO), blocks_of(L, RO, CO)
    real = block < blocks
    inside = real & (row < M) & (column < M)
    offset = offsets_of(per_row, stride, M, L, RI, CI, RO, CO)
    w, up, down, unusable = read(scores, offset, inside, ABSOLUTE, RO, CO)
    if WARM:
        place = (block.to(tl.int64) * 2 + 1) * M + column
        given = tl.load(warm + tl.max_contiguous(place, (L, 1, 1)), mask=real & (column < M), other=0.0)
        v = in_range(given * up * Q_ONE)
    else:
        largest = block_max(w, RO, CO)
        v = in_range(anneal(w, largest, row, column, n, sharpness, stages, per_stage, M, RO, CO) * Q_ONE)
    # Not before the iteration: it needs all registers.
    terms = tl.load(ties + tl.max_contiguous(row * SIDE + column, (L, 1, 1)))
    q = (w * Q_ONE).to(tl.int32) + (terms >> HIDDEN)
    if M < SIDE:
        v = tl.where(column < M, v, FAR)
    z = q + tl.where(best_of_rows(q - v, row, column, n, M, RO, CO), 0, APART)
    allowed = tl.where(real, 1, 0)
    z = swap(z, v, row, column, allowed, APART, RO, CO)
    z, v = balance(z, v, row, column, n, allowed, most, M, APART, FAR, RO, CO)
    u, v, left = centre(z, v, row, column, n, real, tries, M, scores.dtype.element_ty == tl.float64, RO, CO)
    kept = z < FAR
    write(mask, kept, offset, inside, WORDS)
    tl.store(prices + tl.max_contiguous(block * SIDE + column, (L, 1, 1)), v, mask=real)
    exact = read_again(scores, offset, inside)
    total = block_sum(tl.where(kept, exact, 0.0), RO, CO)
    wrong = block_max(unusable, RO, CO)
    tl.store(objective + block, total, mask=real)
    tl.store(state + block, left + 2 * wrong, mask=real)
    if DUALS:
        unit = down * (1.0 / Q_ONE)
        place = block.to(tl.int64) * (2 * M)
        tl.store(duals + tl.max_contiguous(place + row, (L, 1, 1)), u.to(tl.float64) * unit, mask=real & (row < M))
        tl.store(
            duals + tl.max_contiguous(place + M + column, (L, 1, 1)), v.to(tl.float64) * unit, mask=real & (column < M)
        )


@triton.jit
def in_range(v):
    """Prices as integers. Those of bad or useless starts are cut: any prices will do."""
    return tl.minimum(tl.maximum(v, -LIMIT), LIMIT).to(tl.int32)


@triton.jit
def best_of_rows(x, row, column, n, M: tl.constexpr, RO: tl.constexpr, CO: tl.constexpr):
    """Are entries among the n largest of their row, up to their last bits? They are replaced, so that none are equal.

    They fall along the diagonals as the tie terms do, so that of equal scores every column gets n at once.
    """
    SIDE: tl.constexpr = CO * x.shape[2]
    x = (x & ~(SIDE - 1)) | (SIDE - 1 - (row + column) % M)
    for _ in range(n):
        x = tl.where(x == row_max(x, RO, CO), TAKEN, x)
    return (x == TAKEN) & (row < M)


@triton.jit
def centre(
    z, v, row, column, n, real, tries, M: tl.constexpr, ROUNDED: tl.constexpr, RO: tl.constexpr, CO: tl.constexpr
):
    """Move u and v midway between what they keep and what they do not, in turn, until that proves the mask.

    If all of a row's w - v leave a gap around their threshold that the invisible and the visible part of tie terms
    cannot bridge, u in its middle is a proof. Returns u, v, what is left, int32 [L, 1, 1].
    """
    GAP: tl.constexpr = 2 * VISIBLE + 2 + (2 * ROUNDING if ROUNDED else 0)
    u = row_min(z - v, RO, CO)
    uneven = wrong_counts(z < FAR, row, column, n, M, RO, CO) > 0
    left = tl.where(real, 1, 0)
    rounds = 0
    while (largest_of_all(left) > 0) & (rounds < tries):
        x = z - v
        low, high = row_max(x, RO, CO) - APART, row_min(x, RO, CO)
        narrow = ((high - low < GAP) | uneven).to(tl.int32)
        moving = left > 0
        u = tl.where(moving, low + ((high - low) >> 1), u)
        left = tl.where(moving, block_max(narrow, RO, CO), 0)
        x = z - u
        low, high = column_max(x, RO, CO) - APART, column_min(x, RO, CO)
        v = tl.where((left > 0) & (column < M), low + ((high - low) >> 1), v)
        rounds += 1
    return u, v, left
