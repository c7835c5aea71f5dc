"""What is done to a group of LANES blocks before and after the dual passes.

A group holds LANES consecutive blocks, counted row by row of tiles, one per lane; it may reach over the end of a row of
tiles. Entry (i, j) of its blocks is row i * m + j of an array [m * m, LANES].
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tsenor_cli.kernels.compilation import compiled
from tsenor_cli.kernels.contract import Mask, Scores, Untyped
from tsenor_cli.kernels.lanes import LANES, as_count, as_float32, as_float64, bits, load, spread, store, where

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Bits = npt.NDArray[np.uint16]  # lane t in bit t
ALL = (1 << LANES) - 1


@compiled
def gather(scores: Scores, m: int, block: int, used: int, raw: Scores) -> None:
    """Bring blocks block .. block+used-1 of scores [rows, cols] into the lanes of raw [m * m, LANES].

    The other lanes keep what they hold: finite numbers that nobody will look at.
    """
    across = scores.shape[1] // m
    tile_row, tile, lane = block // across, block % across, 0
    while lane < used:
        run = min(used - lane, across - tile)  # blocks that lie side by side
        for i in range(m):
            line = scores[tile_row * m + i, tile * m : (tile + run) * m]
            for k in range(run):
                for j in range(m):
                    raw[i * m + j, lane + k] = line[k * m + j]
        lane, tile_row, tile = lane + run, tile_row + 1, 0


@compiled
def scatter(kept: Bits, m: int, block: int, used: int, mask: Mask) -> None:
    """Write the lanes of kept [m * m] to their blocks of mask [rows, cols]: the way back of `gather`."""
    across = mask.shape[1] // m
    tile_row, tile, lane = block // across, block % across, 0
    while lane < used:
        run = min(used - lane, across - tile)
        for i in range(m):
            line = mask[tile_row * m + i, tile * m : (tile + run) * m]
            words = kept[i * m : (i + 1) * m]
            for k in range(run):
                for j in range(m):
                    line[k * m + j] = (words[j] >> np.uint16(lane + k)) & np.uint16(1) != 0
        lane, tile_row, tile = lane + run, tile_row + 1, 0


@compiled
def normalise(raw: Scores, w: F32, factors: Scores, inverse: F64) -> bool:
    """Write raw · 2^-e to w, with the largest score of each block in [0.5, 1); return False if a score is unusable.

    Exact where it matters: for float32, what is lost lies 2⁻¹²⁶ below the largest score of its block. The way back is
    inverse [2, LANES], whose product is 2^e; factors [2, LANES] is scratch.
    """
    size = len(raw)
    zero, infinity = spread(raw.dtype.type(0.0)), spread(raw.dtype.type(np.inf))
    largest, sound = zero, infinity > zero
    for k in range(size):
        x = load(raw, k)
        sound = sound & (x >= zero) & (infinity > x)
        largest = where(x > largest, x, largest)
    if bits(sound) != ALL:
        return False
    store(inverse, 0, as_float64(largest))
    split_exponents(inverse)
    factors[:] = 1.0 / inverse
    one_half, other_half = load(factors, 0), load(factors, 1)
    for k in range(size):
        store(w, k, as_float32(load(raw, k) * one_half * other_half))
    return True


@compiled
def split_exponents(inverse: F64) -> None:
    """Replace the largest scores in inverse[0] by 2^e in two factors: alone, 2^-e of a denormal is no number.

    e is read from the bits of a float64; a denormal float64 reads as 2^-1022, which is near enough. Zero has e = 0.
    """
    words = inverse.view(np.int64)
    for t in range(LANES):
        e = (words[0, t] >> 52) - 1022 if words[0, t] != 0 else 0
        half = e // 2
        words[0, t] = (half + 1023) << 52
        words[1, t] = (e - half + 1023) << 52


@compiled
def keep(w: F32, u: F32, v: F32, n: int, kept: Bits, certificate: F64, counts: npt.NDArray[np.uint8]) -> int:
    """Keep w - v > u; return the lanes, as bits, that do not have n in every row and column.

    certificate [2, LANES] gets the objective and the excess of each block, which mean what they say only where all
    counts are right. The same subtraction as in the dual passes, so a row has at most n (docs/mathematics.md).
    counts [m, LANES] is scratch.
    """
    m = len(u)
    none, wanted, zero = spread(np.uint8(0)), spread(np.uint8(n)), spread(0.0)
    for j in range(m):
        store(counts, j, none)
    wrong, objective, excess = wanted != wanted, zero, zero  # noqa: PLR0124  (no lane is wrong yet)
    for i in range(m):
        u_row, along_row = load(u, i), none
        u_exact = as_float64(u_row)
        for j in range(m):
            score, v_column = load(w, i * m + j), load(v, j)
            above = score - v_column > u_row
            kept[i * m + j] = bits(above)
            count = as_count(above)
            along_row = along_row + count
            store(counts, j, load(counts, j) + count)
            exact = as_float64(score)
            reduced = exact - u_exact - as_float64(v_column)
            objective = objective + where(above, exact, zero)
            slack = where(above, zero - reduced, reduced)
            excess = excess + where(slack > zero, slack, zero)
        wrong = wrong | (along_row != wanted)
    for j in range(m):
        wrong = wrong | (load(counts, j) != wanted)
    store(certificate, 0, objective)
    store(certificate, 1, excess)
    return int(bits(wrong))


@compiled
def take_lane(w: F32, u: F32, v: F32, t: int, work: Untyped) -> None:
    """Copy the block of lane t and its duals to a Workspace of the repair."""
    m = len(u)
    for i in range(m):
        work.u[i], work.v[i] = u[i, t], v[i, t]
        for j in range(m):
            work.w[i, j] = work.w_columns[j, i] = w[i * m + j, t]


@compiled
def put_lane(work: Untyped, t: int, kept: Bits, certificate: F64) -> None:
    """Replace the mask and the certificate of lane t by those of a repaired block."""
    m = len(work.u)
    bit, objective, excess = np.uint16(1 << t), 0.0, 0.0
    for i in range(m):
        for j in range(m):
            score = work.w[i, j]
            slack = score - work.u[i] - work.v[j]
            if work.kept[i, j]:
                kept[i * m + j] |= bit
                objective, slack = objective + score, -slack
            else:
                kept[i * m + j] &= ~bit
            excess += max(slack, 0.0)
    certificate[0, t], certificate[1, t] = objective, excess
