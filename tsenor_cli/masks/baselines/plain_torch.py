"""The pipeline of the TSENOR paper (arXiv 2505.23949) in plain batched torch operators, as one would first write it.

Algorithm 1 is multiplicative, which float32 bears for moderate τ; the greedy step goes rank by rank, for all blocks at
once.
"""

from __future__ import annotations

import torch

TAU, ITERATIONS, STEPS = 50.0, 100, 10  # τ times the largest score; the settings with which it is best


def solve(blocks: torch.Tensor, n: int) -> torch.Tensor:
    """Good masks [B, M, M]; exactly n per row and column, if STEPS of local search are enough."""
    scores = blocks.float()
    mask = greedy(dykstra(scores, n), n)
    local_search(scores, mask, n, STEPS)
    return mask


def dykstra(blocks: torch.Tensor, n: int) -> torch.Tensor:
    """Algorithm 1: S [B, M, M] of float32 scores."""
    exponent = TAU * blocks / blocks.amax((1, 2), keepdim=True).clamp_min(1e-30)
    s = torch.exp(exponent - exponent.amax((1, 2), keepdim=True))
    q = torch.ones_like(s)
    for _ in range(ITERATIONS):
        s = s * (n / s.sum(2, keepdim=True))  # lines 3 and 4: rows, then columns, to n
        s = s * (n / s.sum(1, keepdim=True))
        product = s * q
        clipped = product.clamp(max=1)  # line 5
        q = q * (s / clipped.clamp_min(1e-30))  # line 6
        s = clipped
    return s


def greedy(values: torch.Tensor, n: int) -> torch.Tensor:
    """Algorithm 2: entries [B, M, M] in descending order while their row and column hold fewer than n."""
    count, m, _ = values.shape
    order = values.reshape(count, m * m).argsort(dim=1, descending=True, stable=True)
    rows, columns = torch.zeros(2, count, m, dtype=torch.int32, device=values.device)
    mask = torch.zeros(count, m * m, dtype=torch.bool, device=values.device)
    every = torch.arange(count, device=values.device)
    for place in order.T:
        i, j = place // m, place % m
        taken = (rows[every, i] < n) & (columns[every, j] < n)
        mask[every, place] = taken
        rows[every, i] += taken
        columns[every, j] += taken
    return mask.view(count, m, m)


def local_search(scores: torch.Tensor, mask: torch.Tensor, n: int, steps: int | None = None) -> None:
    """Algorithm 2: fill the first row i and column j with room by the best exchange; `mask` changes in place.

    `steps` is the most units of a block; None is until nothing can be gained.
    """
    m, lowest = mask.shape[1], torch.finfo(scores.dtype).min
    todo = (mask.sum(2) < n).any(1).nonzero()[:, 0]
    for _ in range(n * m if steps is None else steps):
        if len(todo) == 0:
            return
        w, s, every = scores[todo], mask[todo], torch.arange(len(todo), device=mask.device)
        i, j = (s.sum(2) < n).int().argmax(1), (s.sum(1) < n).int().argmax(1)
        row, column = s[every, i], s[every, :, j]
        gain = w[every, i][:, None, :] + w[every, :, j][:, :, None] - w
        gain = gain.masked_fill(~s | row[:, None, :] | column[:, :, None], lowest)
        best = gain.view(len(todo), -1).argmax(1)
        at_row, at_column = best // m, best % m
        possible = gain.view(len(todo), -1)[every, best] > lowest
        b = todo[possible]
        mask[b, at_row[possible], at_column[possible]] = False
        mask[b, i[possible], at_column[possible]] = True
        mask[b, at_row[possible], j[possible]] = True
        todo = b[(mask[b].sum(2) < n).any(1)]
