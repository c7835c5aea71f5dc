"""The standard N:M mask on a GPU, the same as that of kernels/standard.py bit by bit."""

from __future__ import annotations

import torch

from tsenor_cli.kernels.contract import Tally, UnusableScoresError
from tsenor_cli.kernels.gpu.standard_kernel import OBJECTIVE, STATISTICS, UNUSABLE, variants
from tsenor_cli.kernels.gpu.variant import DTYPES


def solve_standard(scores: torch.Tensor, n: int, m: int, mask: torch.Tensor, *, absolute: bool = False) -> Tally:
    """Fill `mask` with the best standard n:m mask of `scores`: of m along a row the n largest, of equals the first.

    scores [rows, cols] float32, bfloat16, float16 or float64, and mask [rows, cols] bool: contiguous, on one device.

    Raises:
        UnusableScoresError: a score is negative, unless `absolute`, or not finite.
    """
    groups = scores.numel() // m
    if groups == 0:
        return Tally(0.0, 0.0, 0.0, 0)
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
    totals = statistics.sum(0).tolist()
    if totals[UNUSABLE.value] > 0:
        raise UnusableScoresError
    return Tally(objective=totals[OBJECTIVE.value], excess=0.0, worst_gap=0.0, repaired=0)
