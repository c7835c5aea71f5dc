"""The standard N:M mask on a GPU, the same as that of kernels/standard.py bit by bit."""

from __future__ import annotations

from functools import partial

import torch

from tsenor_cli.kernels.contract import Pending, Tally, UnusableScoresError
from tsenor_cli.kernels.gpu.standard_kernel import OBJECTIVE, STATISTICS, UNUSABLE, variants
from tsenor_cli.kernels.gpu.variant import DTYPES


def solve_standard(scores: torch.Tensor, n: int, m: int, mask: torch.Tensor, *, absolute: bool = False) -> Pending:
    """Fill `mask` with the best standard n:m mask of `scores`: of m along a row the n largest, of equals the first.

    scores [rows, cols] float32, bfloat16, float16 or float64, and mask [rows, cols] bool: contiguous, on one device.

    Scores that are negative, unless `absolute`, or not finite are told when the tally is asked for.
    """
    groups = scores.numel() // m
    (variant,) = variants(m, n, DTYPES[str(scores.dtype).removeprefix("torch.")], absolute=absolute)
    programs = -(-groups // variant.constants["G"])
    statistics = torch.empty((programs, STATISTICS.value), dtype=torch.float64, device=scores.device)
    variant.launch(
        programs,
        scores=scores,
        mask=mask.view(torch.uint8),
        statistics=statistics,
        groups=groups,
        rounds=min(n, m - n),
        drop=int(m - n < n),
    )
    return partial(tally, statistics.sum(0))


def tally(sums: torch.Tensor) -> Tally:
    """What all programs found, float64 [STATISTICS], once it is there."""
    totals = sums.tolist()
    if totals[UNUSABLE.value] > 0:
        raise UnusableScoresError
    return Tally(objective=totals[OBJECTIVE.value], excess=0.0, worst_gap=0.0, repaired=0)
