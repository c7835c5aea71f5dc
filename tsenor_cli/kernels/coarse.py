"""Scores and duals at half the width: most dual passes need no more, and take half the time."""

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

LEAST, MOST = np.int32(-1 << 15), np.int32((1 << 15) - 1)
MEAN_BITS = 14  # the mean of a block becomes 2^13 to 2^14: what is cut off lies far above the threshold
SUM_BITS = 12  # what a sum of 2^12 numbers of 28 bits has to lose


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
def coarsen(q: Pointer, v: Pointer, m: int, work: Coarse) -> None:
    """Take (q - mean) >> shift and v >> shift from q [m * m, LANES] and v [m, LANES]."""
    total, size, down = spread(np.int32(0)), m * m, spread(np.int32(SUM_BITS))
    for k in range(size):
        total = total + (load(q, k) >> down)
    mean = as_float32(total) * spread(np.float32(2**SUM_BITS / size)) + spread(np.float32(2 ** (MEAN_BITS - 1)))
    exponent = (as_bits(mean, False) >> spread(np.int32(23))) - spread(np.int32(126))
    shift, middle = exponent - spread(np.int32(MEAN_BITS)), as_int32(mean)
    store(work.shift, 0, shift)
    for k in range(size):
        store(work.q, k, clamped((load(q, k) - middle) >> shift))
    for k in range(m):
        store(work.v, k, clamped(load(v, k) >> shift))


@compiled
def clamped(x: Untyped) -> Untyped:
    """int32 as int16, at its limits where it is beyond them."""
    return as_int16(larger(smaller(x, spread(MOST)), spread(LEAST)))


@compiled
def refine(work: Coarse, m: int, v: Pointer) -> None:
    """The column duals that were found, in full width. The mean is in those of the rows, which follow from them."""
    shift = load(work.shift, 0)
    for k in range(m):
        store(v, k, as_int32(load(work.v, k)) << shift)
