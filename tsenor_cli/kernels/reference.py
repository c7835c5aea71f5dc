"""The exact solvers as one would explain them, block by block in integers; slow, and short enough to check by eye.

The names are those of docs/mathematics.md. The fast kernels must agree with these: the same mask, always.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tsenor_cli.kernels.contract import Mask, Scores, Tally, UnusableScoresError
from tsenor_cli.kernels.ties import SCORE_BITS, tie_table

I64 = npt.NDArray[np.int64]
PASSES = 12  # any number is right; more passes leave less to the augmenting paths


def solve_transposable(scores: Scores, n: int, m: int, mask: Mask) -> Tally:
    """Fill `mask` with the optimal transposable n:m mask of `scores`, float32 or float64; see contract.py."""
    _check(scores)
    ties = tie_table(n, m)
    objectives, excesses, gaps, repaired = [], [], [0.0], 0
    for row in range(0, scores.shape[0], m):
        for column in range(0, scores.shape[1], m):
            tile = slice(row, row + m), slice(column, column + m)
            w, exponent = scaled(scores[tile])
            s, u, v, paths = solve_block(w + ties, n)
            mask[tile] = s
            kept = math.fsum(scores[tile][s].astype(np.float64))
            excess = math.ldexp(excess_of(w, s, u, v), exponent - SCORE_BITS) if scores[tile].any() else 0.0
            objectives.append(kept)
            excesses.append(excess)
            gaps.append(excess / (kept + excess) if excess > 0 else 0.0)
            repaired += paths > 0
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


def scaled(block: Scores) -> tuple[I64, int]:
    """Return w = floor(block · 2^(SCORE_BITS - e)) and e, with max(block) in [2^(e-1), 2^e); e = 0 for zeros.

    A largest score that is a denormal float64 counts as one of 2^-1022.
    """
    exponent = max(math.frexp(block.max())[1], -1022)
    return np.floor(np.ldexp(block.astype(np.float64), SCORE_BITS - exponent)).astype(np.int64), exponent


def solve_block(w: I64, n: int) -> tuple[Mask, I64, I64, int]:
    """Return an optimal mask s [m, m] of one block, optimal duals u, v [m], and how many paths it took."""
    u, v = dual_passes(w, n)
    s = start(w, v, n)
    u = np.where(s, w - v, w.max() - v.min() + 1).min(axis=1)  # between the kept and the others
    paths = 0
    while (s.sum(axis=0) > n).any():
        augment(w, s, u, v, n)
        paths += 1
    return s, u, v, paths


def dual_passes(w: I64, n: int) -> tuple[I64, I64]:
    """Coordinate descent on the dual: every u_i, then every v_j, and so on; the last pass is over the rows."""
    v = np.zeros(len(w), np.int64)
    u = middle(w, n)
    for _ in range(PASSES - 1):
        v = middle((w - u[:, None]).T, n)
        u = middle(w - v, n)
    return u, v


def middle(x: I64, n: int) -> I64:
    """Midway between the n-th and the (n+1)-th largest of every row of x: there the dual is smallest."""
    descending = -np.sort(-x, axis=1)
    return (descending[:, n - 1] + descending[:, n]) >> 1


def start(w: I64, v: I64, n: int) -> Mask:
    """Keep the n largest w - v of every row."""
    s = np.zeros(w.shape, np.bool_)
    np.put_along_axis(s, np.argsort(v - w, axis=1, kind="stable")[:, :n], values=True, axis=1)
    return s


def augment(w: I64, s: Mask, u: I64, v: I64, n: int) -> None:
    """Move one unit from an over-full to an under-full column along a cheapest path; s, u and v change in place.

    Dijkstra over rows and columns. Column → row drops a kept entry, row → column takes a new one; complementary
    slackness makes both reduced costs non-negative.
    """
    m, never = len(w), np.iinfo(np.int64).max
    reduced = w - u[:, None] - v
    distance = np.concatenate([np.where(s.sum(axis=0) > n, 0, never), np.full(m, never)])  # columns, then rows
    parent = np.full(2 * m, -1)
    done = np.zeros(2 * m, np.bool_)
    while True:
        node = int(np.argmin(np.where(done, never, distance)))
        done[node] = True
        if node < m and s[:, node].sum() < n:
            break
        if node < m:
            edges, cost = m + np.flatnonzero(s[:, node]), reduced[s[:, node], node]
        else:
            edges, cost = np.flatnonzero(~s[node - m]), -reduced[node - m, ~s[node - m]]
        through = distance[node] + cost
        closer = (through < distance[edges]) & ~done[edges]
        distance[edges[closer]] = through[closer]
        parent[edges[closer]] = node
    shift = np.maximum(distance[node] - np.minimum(distance, distance[node]), 0)
    v += shift[:m]
    u -= shift[m:]
    while parent[node] >= 0:
        row, source = parent[node] - m, parent[parent[node]]
        s[row, node], s[row, source] = True, False
        node = source


def excess_of(w: I64, s: Mask, u: I64, v: I64) -> float:
    """Dual value - primal value of a block, as a sum of non-negative terms (docs/mathematics.md, eq. 4)."""
    reduced = w - u[:, None] - v
    return float(np.maximum(np.where(s, -reduced, reduced), 0).sum(dtype=np.float64))


def _check(scores: Scores) -> None:
    if not (np.isfinite(scores) & (scores >= 0)).all():
        raise UnusableScoresError
