"""The pipeline of the paper in plain torch, with a certificate: what stands in for a kernel where users allow it.

Its masks are feasible but not optimal, and it is far slower than a kernel.
"""

from __future__ import annotations

import torch

from tsenor_cli.kernels.contract import Tally, UnusableScoresError
from tsenor_cli.masks.baselines import plain_torch
from tsenor_cli.masks.blocks import from_blocks, to_blocks
from tsenor_cli.masks.certificate import excess, objective
from tsenor_cli.specs import NMPattern

NAME = "plain-torch"
_PASSES = 12  # over rows and columns; more of them tighten the bound


def solve_plain(scores: torch.Tensor, pattern: NMPattern, mask: torch.Tensor, *, absolute: bool) -> Tally:
    """Fill `mask` [rows, cols] with a good mask of `scores`; as in kernels/contract.py, on any device."""
    scores = scores.abs() if absolute else scores
    if not bool((torch.isfinite(scores) & (scores >= 0)).all()):
        raise UnusableScoresError
    wide = scores.double()
    if not pattern.transposable:
        groups = wide.view(-1, pattern.m)
        best = groups.argsort(dim=1, descending=True, stable=True)[:, : pattern.n]
        mask.view(-1, pattern.m).zero_().scatter_(1, best, True)
        return Tally(float((wide * mask).sum()), 0.0, 0.0, 0)
    blocks = to_blocks(wide, pattern.m)
    smallest = torch.finfo(wide.dtype).tiny
    relative = (blocks / blocks.amax((1, 2), keepdim=True).clamp_min(smallest)).float()
    kept = plain_torch.greedy(plain_torch.dykstra(relative, pattern.n), pattern.n)
    plain_torch.local_search(relative, kept, pattern.n)
    mask.copy_(from_blocks(kept, tuple(mask.shape)))
    kept_sums, lost = objective(blocks, kept), excess(blocks, kept, *duals(blocks, pattern.n))
    gap = float((lost / (kept_sums + lost).clamp_min(smallest)).max()) if len(blocks) else 0.0
    return Tally(float(kept_sums.sum()), float(lost.sum()), gap, 0, plain_torch.ITERATIONS)


def duals(blocks: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column duals [B, M] of blocks float64 [B, M, M], after some passes of coordinate descent."""
    v = torch.zeros_like(blocks[:, :1])
    for _ in range(_PASSES):
        u = _middle(blocks - v, n, 2)
        v = _middle(blocks - u, n, 1)
    return u[:, :, 0], v[:, 0]


def _middle(x: torch.Tensor, n: int, axis: int) -> torch.Tensor:
    """Midway between the n-th and the (n+1)-th largest along an axis: there the dual is smallest."""
    largest = x.topk(n + 1, axis).values
    return (largest.narrow(axis, n - 1, 1) + largest.narrow(axis, n, 1)) / 2
