"""The solvers as one would explain them, block by block in float64; slow, and short enough to check by eye.

The names are those of docs/mathematics.md. The fast kernels must agree with these: the same objective always, the same
mask wherever only one mask is optimal.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tsenor_cli.kernels.contract import Mask, Scores, Tally, UnusableScoresError

F64 = npt.NDArray[np.float64]
PASSES = 12  # any number is right; more passes leave less to the augmenting paths


def solve_transposable(scores: Scores, n: int, m: int, mask: Mask) -> Tally:
    """Fill `mask` with an optimal transposable n:m mask of `scores`; see contract.py."""
    _check(scores)
    objectives, excesses, gaps, repaired = [], [], [0.0], 0
    for row in range(0, scores.shape[0], m):
        for column in range(0, scores.shape[1], m):
            tile = slice(row, row + m), slice(column, column + m)
            w, exponent = normalised(scores[tile])
            s, u, v, augmentations = solve_block(w, n)
            mask[tile] = s
            kept, excess = w[s].sum(), excess_of(w, s, u, v)
            objectives.append(math.ldexp(kept, exponent))
            excesses.append(math.ldexp(excess, exponent))
            gaps.append(excess / (kept + excess) if excess > 0 else 0.0)
            repaired += augmentations > 0
    return Tally(math.fsum(objectives), math.fsum(excesses), max(gaps), repaired)


def solve_standard(scores: Scores, n: int, m: int, mask: Mask) -> Tally:
    """Keep the n largest of every m consecutive scores of a row; the lower index wins a tie. See contract.py."""
    _check(scores)
    groups = scores.reshape(-1, m)
    best = np.argsort(-groups, axis=1, kind="stable")[:, :n]
    kept = np.zeros(groups.shape, np.bool_)
    np.put_along_axis(kept, best, values=True, axis=1)
    mask[...] = kept.reshape(mask.shape)
    return Tally(math.fsum(groups[kept].astype(np.float64)), 0.0, 0.0, 0)


def normalised(block: Scores) -> tuple[F64, int]:
    """Return w and e with block = w · 2^e exactly and max(w) in [0.5, 1); a block of zeros keeps e = 0."""
    w = block.astype(np.float64)
    exponent = math.frexp(w.max())[1]
    return np.ldexp(w, -exponent), exponent


def solve_block(w: F64, n: int) -> tuple[Mask, F64, F64, int]:
    """Return the optimal mask s [m, m] of one block, optimal duals u, v [m], and how many paths it took."""
    u, v = dual_passes(w, n)
    s = start(w, u, v, n)
    augmentations = 0
    while (s.sum(axis=0) > n).any():
        augment(w, s, u, v, n)
        augmentations += 1
    return s, u, v, augmentations


def dual_passes(w: F64, n: int) -> tuple[F64, F64]:
    """Coordinate descent on the dual: every u_i, then every v_j, and so on; the last pass is over the rows."""
    u = middle(w, n)
    for _ in range(PASSES - 1):
        v = middle((w - u[:, None]).T, n)
        u = middle(w - v, n)
    return u, v


def middle(x: F64, n: int) -> F64:
    """Midway between the n-th and the (n+1)-th largest of every row of x: there the dual is smallest."""
    descending = -np.sort(-x, axis=1)
    return 0.5 * (descending[:, n - 1] + descending[:, n])


def start(w: F64, u: F64, v: F64, n: int) -> Mask:
    """Take w - v > u: at most n per row, since u is at least the (n+1)-th largest.

    A row holds fewer only if its n-th equals u. It is filled with such entries, circulantly from the diagonal, so
    that a block of equal scores starts out balanced.
    """
    m = len(w)
    x = w - v
    s: Mask = x > u[:, None]
    for i in range(m):
        for j in np.roll(np.arange(m), -i):
            if s[i].sum() < n and x[i, j] == u[i]:
                s[i, j] = True
    return s


def augment(w: F64, s: Mask, u: F64, v: F64, n: int) -> None:
    """Move one unit from an over-full to an under-full column along a cheapest path; s, u and v change in place.

    Dijkstra over rows and columns. Column → row drops a kept entry, row → column takes a new one; complementary
    slackness makes both reduced costs non-negative.
    """
    m = len(w)
    reduced = w - u[:, None] - v
    distance = np.concatenate([np.where(s.sum(axis=0) > n, 0.0, np.inf), np.full(m, np.inf)])  # columns, then rows
    parent = np.full(2 * m, -1)
    done = np.zeros(2 * m, np.bool_)
    while True:
        node = int(np.argmin(np.where(done, np.inf, distance)))
        done[node] = True
        if node < m and s[:, node].sum() < n:
            break
        if node < m:
            edges, cost = m + np.flatnonzero(s[:, node]), reduced[s[:, node], node]
        else:
            edges, cost = np.flatnonzero(~s[node - m]), -reduced[node - m, ~s[node - m]]
        through = distance[node] + np.maximum(cost, 0.0)
        closer = (through < distance[edges]) & ~done[edges]
        distance[edges[closer]] = through[closer]
        parent[edges[closer]] = node
    shift = np.maximum(distance[node] - distance, 0.0)
    v += shift[:m]
    u -= shift[m:]
    while parent[node] >= 0:
        row, source = parent[node] - m, parent[parent[node]]
        s[row, node], s[row, source] = True, False
        node = source


def excess_of(w: F64, s: Mask, u: F64, v: F64) -> float:
    """Dual value - primal value of a block, as a sum of non-negative terms (docs/mathematics.md, eq. 4)."""
    reduced = w - u[:, None] - v
    return float(np.maximum(np.where(s, -reduced, reduced), 0.0).sum())


def _check(scores: Scores) -> None:
    if not (np.isfinite(scores) & (scores >= 0)).all():
        raise UnusableScoresError
