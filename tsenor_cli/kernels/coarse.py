"""What the first dual passes have left, at half the width: most passes need no more, and take half the time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tsenor_cli.kernels.compilation import compiled
from tsenor_cli.kernels.contract import Pointer, Untyped
from tsenor_cli.kernels.lanes import (
    as_bits,
    as_float32,
    as_int16,
    as_int32,
    lanes,
    larger,
    load,
    pointer,
    smaller,
    spread,
    store,
)
from tsenor_cli.kernels.passes import LIMIT

LEAST, MOST = np.int32(-1 << 15), np.int32((1 << 15) - 1)
MEAN_BITS = 14  # the mean distance from a threshold becomes 2^13 to 2^14: what is cut off is kept or dropped anyhow
EVERY = 4  # only so many rows are asked for the mean
SUM_BITS = 12  # what a sum of 2^12 numbers of 30 bits has to lose


class Coarse(NamedTuple):
    """LANES blocks in 16 bits. In compiled code, pointers to it."""

    q: Untyped  # [m * m, LANES] int16
    u: Untyped  # [m, LANES] int16
    v: Untyped  # [m, LANES] int16
    shift: Untyped  # [1, LANES] int32


def coarse(m: int) -> Coarse:
    """Allocate a Coarse for blocks of m."""
    return Coarse(lanes(m * m, np.int16), lanes(m, np.int16), lanes(m, np.int16), lanes(1, np.int32))


@compiled
def coarse_pointers(work: Coarse) -> Coarse:
    """What the compiled functions below take."""
    return Coarse(pointer(work.q), pointer(work.u), pointer(work.v), pointer(work.shift))


@compiled
def coarsen(q: Pointer, u: Pointer, v: Pointer, m: int, work: Coarse) -> None:
    """Take (q - u - v) >> shift from q [m * m, LANES], u and v [m, LANES], with duals of 0."""
    total, down, zero = spread(np.int32(0)), spread(np.int32(SUM_BITS)), spread(np.int32(0))
    for i in range(0, m, EVERY):
        for j in range(m):
            r = load(q, i * m + j) - load(u, i) - load(v, j)
            total = total + (larger(r, zero - r) >> down)
    count, least = m * (-(-m // EVERY)), spread(np.float32(2 ** (MEAN_BITS - 1)))
    mean = as_float32(total) * spread(np.float32(2**SUM_BITS / count)) + least
    exponent = (as_bits(mean, False) >> spread(np.int32(23))) - spread(np.int32(126))
    shift = exponent - spread(np.int32(MEAN_BITS))
    store(work.shift, 0, shift)
    for i in range(m):
        for j in range(m):
            r = load(q, i * m + j) - load(u, i) - load(v, j)
            store(work.q, i * m + j, clamped(r >> shift))
        store(work.v, i, spread(np.int16(0)))


@compiled
def clamped(x: Untyped) -> Untyped:
    """int32 as int16, at its limits where it is beyond them."""
    return as_int16(between(x, spread(LEAST), spread(MOST)))


@compiled
def between(x: Untyped, least: Untyped, most: Untyped) -> Untyped:
    return larger(smaller(x, most), least)


@compiled
def refine(work: Coarse, m: int, v: Pointer) -> None:
    """Add the column duals that were found to v [m, LANES], within ± LIMIT. Those of the rows follow from them."""
    shift, zero, limit = load(work.shift, 0), spread(np.int32(0)), spread(np.int32(LIMIT))
    for k in range(m):
        found = between(as_int32(load(work.v, k)), zero - (limit >> shift), limit >> shift)
        store(v, k, between(load(v, k) + (found << shift), zero - limit, limit))
