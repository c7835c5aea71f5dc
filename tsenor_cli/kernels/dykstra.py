"""Algorithm 1 of the TSENOR paper (arXiv 2505.23949), Dykstra's projections, on LANES blocks at a time in float32.

The paper keeps S and Q. Their product is always P = exp(τ w) with rows and columns scaled, and S = min(P, 1): so only P
is kept, and of its factors only those of the columns are multiplied in. As powers of two, P = 2^(t w + U + V).

τ starts small, where the iteration settles at once, and doubles, and the potentials U, V with it, until S is nearly as
good as what the potentials prove. That chooses τ for every block by itself, and it makes float32 safe: after a step
over the columns each of them sums to n, and no row has lost more than a factor n / m. So every line has an entry of at
least (n / m)²: none can vanish, whatever the scores.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tsenor_cli.kernels.compilation import compiled
from tsenor_cli.kernels.contract import Pointer, Untyped
from tsenor_cli.kernels.lanes import (
    as_float32,
    bits,
    from_mask,
    lanes,
    larger,
    load,
    pointer,
    smaller,
    spread,
    store,
    where,
)
from tsenor_cli.kernels.powers import exp2, log2
from tsenor_cli.kernels.schedule import FIRST_TAU, GAP_GOAL, LAST_TAU, LOG2_E, PER_STAGE, RESIDUAL_GOAL

ZERO, ONE, TWO = np.float32(0.0), np.float32(1.0), np.float32(2.0)
# 2^this is lost in the sum of every line, whatever a stage multiplies it with, and yet no denormal number afterwards,
# with which Intel's processors take a hundred times as long.
NOTHING = np.float32(-80.0)
T, RESIDUAL, ITERATIONS, GAP = range(4)  # rows of `state`


class Transport(NamedTuple):
    """The state of LANES blocks. In compiled code, pointers to it. All float32."""

    p: Untyped  # [m * m, LANES] P without the row factors of this stage
    u: Untyped  # [m, LANES] potentials of the rows
    v: Untyped  # [m, LANES] potentials of the columns
    inverse: Untyped  # [m, LANES] 1 / row factor of this stage
    factor: Untyped  # [m, LANES] column factor of this stage
    step: Untyped  # [m, LANES] column factor of the last iteration, not yet in p
    sums: Untyped  # [m, LANES] column sums
    state: Untyped  # [4, LANES] t; residual of the marginals; iterations; gap


def transport(m: int) -> Transport:
    """Allocate a Transport for blocks of m."""
    u, v, inverse, factor, step, sums = (lanes(m, np.float32) for _ in range(6))
    return Transport(lanes(m * m, np.float32), u, v, inverse, factor, step, sums, lanes(4, np.float32))


@compiled
def transport_pointers(work: Transport) -> Transport:
    """What the compiled functions below take."""
    return Transport(
        pointer(work.p),
        pointer(work.u),
        pointer(work.v),
        pointer(work.inverse),
        pointer(work.factor),
        pointer(work.step),
        pointer(work.sums),
        pointer(work.state),
    )


@compiled
def dykstra(q: Pointer, n: int, m: int, tau: float, most: int, work: Transport) -> int:
    """Find potentials for q [m * m, LANES], scores as integers; return the lanes, as bits, that met their goal.

    `tau`, if positive, is the last τ times the largest score, and the only goal then is that of the residual.
    `most` is the largest number of iterations of a block.
    """
    first, last = FIRST_TAU, LAST_TAU
    if tau > 0.0:
        first = last = tau
        while first > FIRST_TAU:
            first *= 0.5
    start(q, m, first, work)
    active, unmet, reached = 0xFFFF, 0xFFFF, first
    while True:
        scale(q, m, work)
        moving = active
        for _ in range(most if tau > 0.0 and reached >= last else PER_STAGE):
            moving &= bits(spread(np.float32(most)) > load(work.state, ITERATIONS))
            if moving == 0:
                break
            moving = iterate(n, m, moving, work)
        absorb(q, n, m, active, work)
        within = bits(spread(np.float32(most)) > load(work.state, ITERATIONS))
        if tau > 0.0:
            unmet = bits(load(work.state, RESIDUAL) > spread(np.float32(RESIDUAL_GOAL * n)))
            active = within
        else:
            unmet = bits(load(work.state, GAP) > spread(np.float32(GAP_GOAL)))
            active &= within & unmet
        if active == 0 or reached >= last:
            return int(~unmet & 0xFFFF)
        double(m, active, work)
        reached *= 2.0


@compiled
def start(q: Pointer, m: int, tau: float, work: Transport) -> None:
    """The first τ, and potentials with which the largest entry of every row of P is 1."""
    most = spread(ONE)
    for k in range(m * m):
        most = larger(most, as_float32(load(q, k)))
    t = spread(np.float32(tau * LOG2_E)) / most
    store(work.state, T, t)
    store(work.state, ITERATIONS, spread(ZERO))
    for i in range(m):
        most = as_float32(load(q, i * m))
        for j in range(1, m):
            most = larger(most, as_float32(load(q, i * m + j)))
        store(work.u, i, spread(ZERO) - t * most)
        store(work.v, i, spread(ZERO))


@compiled
def scale(q: Pointer, m: int, work: Transport) -> None:
    """P = 2^(t q + U + V)."""
    t = load(work.state, T)
    for i in range(m):
        u = load(work.u, i)
        for j in range(m):
            power = t * as_float32(load(q, i * m + j)) + u + load(work.v, j)
            store(work.p, i * m + j, exp2(larger(power, spread(NOTHING))))
        store(work.inverse, i, spread(ONE))
        store(work.factor, i, spread(ONE))
        store(work.step, i, spread(ONE))


@compiled
def iterate(n: int, m: int, moving: int, work: Transport) -> int:
    """One pass through Algorithm 1's loop for the lanes in `moving`; returns those that should go on."""
    wanted, residual, free = spread(np.float32(n)), spread(ZERO), from_mask(moving)
    for j in range(m):
        store(work.sums, j, spread(ZERO))
    for i in range(m):  # scale the rows of S to n
        inverse, total = load(work.inverse, i), spread(ZERO)
        for j in range(m):
            p = load(work.p, i * m + j) * load(work.step, j)
            store(work.p, i * m + j, p)
            total = total + smaller(p, inverse)
        residual = larger(residual, distance(total / inverse, wanted))
        new = where(free, total / wanted, inverse)
        store(work.inverse, i, new)
        a = spread(ONE) / new
        for j in range(m):
            store(work.sums, j, load(work.sums, j) + smaller(load(work.p, i * m + j), inverse) * a)
    for j in range(
        m
    ):  # scale its columns to n; what the next min(P, 1) cuts off stays in P, as Q keeps it in the paper
        total = load(work.sums, j)
        residual = larger(residual, distance(total, wanted))
        step = where(free, wanted / total, spread(ONE))
        store(work.step, j, step)
        store(work.factor, j, load(work.factor, j) * step)
    store(work.state, ITERATIONS, load(work.state, ITERATIONS) + where(free, spread(ONE), spread(ZERO)))
    store(work.state, RESIDUAL, where(free, residual, load(work.state, RESIDUAL)))
    return moving & int(bits(residual > spread(np.float32(RESIDUAL_GOAL * n))))


@compiled
def distance(a: Untyped, b: Untyped) -> Untyped:
    """|a - b|."""
    return larger(a - b, b - a)


@compiled
def absorb(q: Pointer, n: int, m: int, active: int, work: Transport) -> None:
    """Take the factors of the stage into the potentials, and see how far the value of S is from what they prove."""
    t, primal, dual = load(work.state, T), spread(ZERO), spread(ZERO)
    for k in range(m):
        store(work.u, k, load(work.u, k) - log2(load(work.inverse, k)))
        store(work.v, k, load(work.v, k) + log2(load(work.factor, k)))
        dual = dual - (load(work.u, k) + load(work.v, k)) * spread(np.float32(n))
    for i in range(m):
        for j in range(m):
            score = t * as_float32(load(q, i * m + j))
            power = score + load(work.u, i) + load(work.v, j)
            primal = primal + score * smaller(exp2(power), spread(ONE))
            dual = dual + larger(power, spread(ZERO))
    gap = distance(dual, primal) / larger(dual, spread(np.float32(1e-30)))
    store(work.state, GAP, where(from_mask(active), gap, load(work.state, GAP)))


@compiled
def double(m: int, active: int, work: Transport) -> None:
    """Double τ, and the potentials with it."""
    factor = where(from_mask(active), spread(TWO), spread(ONE))
    store(work.state, T, load(work.state, T) * factor)
    for k in range(m):
        store(work.u, k, load(work.u, k) * factor)
        store(work.v, k, load(work.v, k) * factor)
