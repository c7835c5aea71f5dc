"""Masks without any attempt at a proof: the three heuristics that the TSENOR paper compares with."""

from __future__ import annotations

import torch

from tsenor_cli.masks.baselines.plain_torch import greedy

CANDIDATES = 1000


def two_approximation(blocks: torch.Tensor, n: int) -> torch.Tensor:
    """Entries in descending order while their row and column hold fewer than n: at most n, at least half the optimum.

    Hubara et al., Accelerated Sparse Neural Training (NeurIPS 2021), algorithm 1.
    """
    return greedy(blocks, n)


def bi_nm(blocks: torch.Tensor, n: int) -> torch.Tensor:
    """The n largest of every row, then of what is left the n largest of every column: at most n.

    Zhang et al., Bi-directional Masks for Efficient N:M Sparse Training (ICML 2023).
    """
    by_rows = _largest(blocks, n, 2)
    return by_rows & _largest(torch.where(by_rows, blocks, -1), n, 1)


def max_of_random(blocks: torch.Tensor, n: int) -> torch.Tensor:
    """The best of CANDIDATES random masks, the same for all blocks: exactly n. "Max1000" in the TSENOR paper."""
    m, generator = blocks.shape[1], torch.Generator().manual_seed(0)
    circulant = (torch.arange(m)[:, None] + torch.arange(m)) % m < n
    orders = torch.rand(2, CANDIDATES, m, generator=generator).argsort(-1)
    masks = circulant[orders[0][:, :, None], orders[1][:, None, :]]
    sums = blocks.float().flatten(1) @ masks.float().flatten(1).T
    return masks[sums.argmax(1)]


def _largest(blocks: torch.Tensor, n: int, axis: int) -> torch.Tensor:
    mask = torch.zeros(blocks.shape, dtype=torch.bool)
    return mask.scatter_(axis, blocks.topk(n, axis).indices, value=True)
