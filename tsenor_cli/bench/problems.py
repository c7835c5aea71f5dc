"""Random score matrices, named by how they are made."""

from __future__ import annotations

import torch

from tsenor_cli.bench import SCORES
from tsenor_cli.bench.measure import Problem
from tsenor_cli.errors import UsageError


def random_problem(rows: int, columns: int, scores: str, dtype: torch.dtype, seed: int) -> Problem:
    """Magnitudes of random numbers: normal, their cubes (heavy tails, as scores with activations have), or uniform."""
    if scores not in SCORES:
        raise UsageError(f"unknown scores {scores!r}", f"known: {', '.join(SCORES)}")
    generator = torch.Generator().manual_seed(seed)
    if scores == "uniform":
        x = torch.rand(rows, columns, generator=generator)
    else:
        x = torch.randn(rows, columns, generator=generator).abs_()
    return Problem(f"{scores} {rows}x{columns}", (x**3 if scores == "cubed" else x).to(dtype))
