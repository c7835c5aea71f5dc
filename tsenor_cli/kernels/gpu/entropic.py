"""The pipeline of the TSENOR paper (arXiv 2505.23949) on a GPU: kernels/entropic.py, for tensors on a device.

Its masks are feasible but not optimal; how far they may be from it is certified with the duals that the iteration ends
with. Ties and the last bits are not those of the CPU: equal entries are taken along diagonals, see make_keys.
"""

from __future__ import annotations

from functools import partial

import torch

from tsenor_cli.kernels.contract import Pending, Tally, UnusableScoresError
from tsenor_cli.kernels.gpu.entropic_kernel import (
    EXCESS,
    MOST,
    OBJECTIVE,
    STATISTICS,
    UNMET,
    UNUSABLE,
    WORST_GAP,
    entropic_tiling,
    variants,
)
from tsenor_cli.kernels.gpu.variant import DTYPES, warp_size
from tsenor_cli.kernels.schedule import DEFAULT_ITERATIONS, FIRST_TAU, LAST_TAU


def solve_entropic(
    scores: torch.Tensor,
    n: int,
    m: int,
    mask: torch.Tensor,
    *,
    tau: float | None = None,
    iterations: int | None = None,
    local_search: int | None = None,
    absolute: bool = False,
) -> Pending:
    """Fill `mask` with a good transposable n:m mask of `scores`; the options are those of kernels/entropic.py.

    scores [rows, cols] float32, bfloat16, float16 or float64, and mask [rows, cols] bool: contiguous, on one device.
    Scores that are negative, unless `absolute`, or not finite are told when the tally is asked for.
    """
    return solve(scores, n, m, mask, (tau, iterations, local_search), absolute=absolute)


def solve(
    scores: torch.Tensor,
    n: int,
    m: int,
    mask: torch.Tensor,
    settings: tuple[float | None, int | None, int | None],
    *,
    absolute: bool,
    states: torch.Tensor | None = None,
) -> Pending:
    """Launch the kernel; `states` int32 [3, blocks, side, side] receives what its EXPORT says."""
    tau, iterations, by_gain = settings
    blocks = scores.numel() // (m * m)
    lanes_per_warp = warp_size(scores)
    (variant,) = variants(
        m,
        n,
        DTYPES[str(scores.dtype).removeprefix("torch.")],
        lanes_per_warp,
        absolute=absolute,
        export=states is not None,
    )
    programs = -(-blocks // entropic_tiling(m, lanes_per_warp).blocks)
    statistics = torch.empty((programs, STATISTICS.value), dtype=torch.float64, device=scores.device)
    variant.launch(
        programs,
        scores=scores,
        mask=mask.view(torch.uint8),
        statistics=statistics,
        states=statistics.view(torch.int32) if states is None else states,
        blocks=blocks,
        per_row=scores.shape[1] // m,
        stride=scores.shape[1],
        n=n,
        first=first_tau(tau),
        last=LAST_TAU if tau is None else float(tau),
        fixed=int(tau is not None),
        most=DEFAULT_ITERATIONS if iterations is None else iterations,
        by_gain=n * m if by_gain is None else by_gain,
    )
    return partial(tally, torch.stack([statistics.sum(0), statistics.amax(0)]))


def first_tau(tau: float | None) -> float:
    """Where the doubling starts that ends with `tau`, or wherever it will, if None."""
    first = FIRST_TAU if tau is None else float(tau)
    while first > FIRST_TAU:
        first *= 0.5
    return first


def tally(totals: torch.Tensor) -> Tally:
    """The sums of what the programs say, and the largest, float64 [2, STATISTICS], once they are there."""
    both = totals.tolist()
    if both[1][UNUSABLE.value] > 0:
        raise UnusableScoresError
    return Tally(
        objective=both[0][OBJECTIVE.value],
        excess=both[0][EXCESS.value],
        worst_gap=both[1][WORST_GAP.value],
        repaired=0,
        iterations=int(both[1][MOST.value]),
        unconverged=int(both[0][UNMET.value]),
    )
