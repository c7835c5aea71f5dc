"""Small layers with correlated inputs, and what a mask solver may be replaced by."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tsenor_cli.masks.solution import MaskSolution, Status, join_columns
from tsenor_cli.pruners.base import InputStats
from tsenor_cli.specs import NMPattern

TWO_OF_FOUR = NMPattern(2, 4)


@dataclass(frozen=True)
class KeepAll:
    """A solve_mask that prunes nothing."""

    pattern: NMPattern = TWO_OF_FOUR
    keeps_largest: bool = False

    def __call__(self, scores: torch.Tensor, *, absolute: bool = False) -> MaskSolution[torch.Tensor]:
        total = float((scores.abs() if absolute else scores).sum())
        mask = torch.ones_like(scores, dtype=torch.bool)
        return MaskSolution(mask, total, total, 0.0, "all", Status.CONVERGED, 0, 0, 0, 0.0)

    def repeated(self, rows: int, dtype: torch.dtype) -> OneByOne:
        return OneByOne(self, rows, dtype)


class OneByOne:
    """A Repeated of anything that can be called."""

    def __init__(self, solve_mask, rows, dtype):
        self.solve_mask, self.solutions = solve_mask, []
        self.scores = torch.empty(rows, solve_mask.pattern.m, dtype=dtype)
        self.mask = torch.empty(self.scores.shape, dtype=torch.bool)

    def solve(self):
        self.solutions.append(self.solve_mask(self.scores))
        self.mask.copy_(self.solutions[-1].mask)

    def solution(self, mask):
        return join_columns(self.solutions, mask)


def make_inputs(tokens: int, features: int, seed: int = 0) -> torch.Tensor:
    """float64 [tokens, features]: every feature is a mixture of all, and they differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64) / features**0.5
    sizes = torch.randn(features, generator=generator, dtype=torch.float64).mul(0.5).exp()
    return torch.randn(tokens, features, generator=generator, dtype=torch.float64) @ mixing * sizes


def make_weight(out: int, features: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(out, features, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stats_of(inputs: torch.Tensor) -> InputStats:
    return replace(stats_from(inputs.double().T @ inputs.double()), tokens=len(inputs))


def stats_from(gram: torch.Tensor) -> InputStats:
    """Statistics with a copy of this Gram matrix, of which nobody can read what stands below the diagonal."""
    hidden = torch.ones_like(gram, dtype=torch.bool).tril(-1)
    return InputStats(1, gram.diagonal().clone(), gram.masked_fill(hidden, torch.nan))


def symmetric(gram: torch.Tensor) -> torch.Tensor:
    """The whole of a Gram matrix, from its upper triangle."""
    return gram.triu() + gram.triu(1).T


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    return symmetric(gram) + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def least_squares(weight: torch.Tensor, mask: torch.Tensor, inputs: torch.Tensor, damping: float = 0.0) -> torch.Tensor:
    """The best weights float64 on the mask, every row by itself; damping as rows of further inputs."""
    ridge = (damping * inputs.square().sum(0).mean()).sqrt() * torch.eye(inputs.shape[1], dtype=torch.float64)
    inputs = torch.cat([inputs, ridge])
    best = torch.zeros(weight.shape, dtype=torch.float64)
    for row, kept in enumerate(mask):
        target = inputs @ weight[row].double()
        best[row, kept] = torch.linalg.lstsq(inputs[:, kept], target[:, None], driver="gelsd").solution[:, 0]
    return best


def loss(weight: torch.Tensor, pruned: torch.Tensor, gram: torch.Tensor) -> float:
    """tr((W - W') G (W - W')ᵀ), row by row."""
    difference, gram = weight.double() - pruned.double(), symmetric(gram)
    return sum(float(row @ gram @ row) for row in difference)
