"""The exact transposable solver on a GPU: the mask of kernels/exact.py and of the reference, bit by bit.

Two kernels. The first solves every block for 26 bits of its scores and proves most of them optimal for all bits; the
second settles the rest exactly. Blocks of 4 are enumerated instead.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import torch

from tsenor_cli.kernels.contract import Pending, Tally, UnusableScoresError
from tsenor_cli.kernels.gpu import settle_kernel
from tsenor_cli.kernels.gpu.exact_variants import (
    can_write_words,
    draft_tiling,
    draft_variant,
    four_variant,
    settle_variants,
)
from tsenor_cli.kernels.gpu.four_kernel import EXCESS, OBJECTIVE, STATISTICS, UNUSABLE, WORST_GAP
from tsenor_cli.kernels.gpu.variant import DTYPES, Variant, warp_size
from tsenor_cli.kernels.ties import tie_table

LOG2_E = 1.4426950408889634
# Of annealing, for m up to: the first τ, how many stages (τ doubles), iterations of each. More cost more than the paths
# they save.
ANNEALING = {8: (10.0, 1, 12), 16: (16.0, 2, 16), 32: (16.0, 2, 16), 64: (25.0, 2, 24)}
TRIES = 8  # rounds of centring
COUNT = settle_kernel.STATISTICS.value
SWEEPS_PER_LINE = 200  # of Bellman and Ford: far more than any block has needed


def solve_transposable(
    scores: torch.Tensor,
    n: int,
    m: int,
    mask: torch.Tensor,
    *,
    absolute: bool = False,
    warm: torch.Tensor | None = None,
    duals: torch.Tensor | None = None,
) -> Pending:
    """Fill `mask` with the optimal transposable n:m mask of `scores`; warm and duals are those of kernels/exact.py.

    scores [rows, cols] float32, bfloat16, float16 or float64, mask [rows, cols] bool, warm and duals float64
    [blocks, 2, m]: contiguous, on one device.

    Scores that are negative, unless `absolute`, or not finite are told when the tally is asked for; and paths that must
    exist and were not found, as a RuntimeError.
    """
    blocks = scores.numel() // (m * m)
    dtype, lanes = DTYPES[str(scores.dtype).removeprefix("torch.")], warp_size(scores)
    if m == 4 and duals is None and mask.data_ptr() % 4 == 0:
        return enumerate_fours(scores, mask, n, four_variant(n, dtype, lanes, absolute=absolute))
    form, device = draft_tiling(m, lanes), scores.device
    ties = padded_ties(n, m, form.side, device)
    prices = torch.empty((blocks, form.side), dtype=torch.int32, device=device)
    state = torch.empty(blocks, dtype=torch.int32, device=device)
    objective = torch.empty(blocks, dtype=torch.float64, device=device)
    shared = {"scores": scores, "ties": ties, "mask": mask.view(torch.uint8), "n": n}
    shared |= {"per_row": scores.shape[1] // m, "stride": scores.shape[1]}
    found, most = objective if duals is None else duals, SWEEPS_PER_LINE * m
    tau, stages, per_stage = next(annealing for largest, annealing in ANNEALING.items() if m <= largest)
    width = form.constants["CI"]
    words = can_write_words(m, form) and mask.data_ptr() % width == 0
    word = {4: torch.int32, 8: torch.int64}[width] if words else torch.uint8
    options = {"absolute": absolute, "warm": warm is not None, "duals": duals is not None, "words": words}
    draft_variant(m, dtype, lanes, **options).launch(
        -(-blocks // form.blocks),
        **shared | {"mask": mask.view(word)},
        warm=objective if warm is None else warm,
        prices=prices,
        state=state,
        objective=objective,
        duals=found,
        blocks=blocks,
        sharpness=tau * LOG2_E,
        stages=stages,
        per_stage=per_stage,
        tries=TRIES,
        most=most,
    )
    # How many blocks wait stays on the card: to ask would be to wait, and then the card would wait for the host.
    queue = torch.nonzero_static(state, size=blocks, fill_value=settle_kernel.NOBODY.value).squeeze(1)
    both = settle_variants(m, dtype, lanes, duals=duals is not None)
    return settle_queue(shared, queue, state, prices, objective, found, most, both)


def enumerate_fours(scores: torch.Tensor, mask: torch.Tensor, n: int, variant: Variant) -> Pending:
    """Blocks of 4; no start makes this faster, so none is asked for."""
    blocks = scores.numel() // 16
    programs = -(-blocks // variant.constants["L"])
    statistics = torch.empty((programs, STATISTICS.value), dtype=torch.float64, device=scores.device)
    variant.launch(
        programs,
        scores=scores,
        ties=padded_ties(n, 4, 4, scores.device),
        mask=mask.view(torch.int32),
        statistics=statistics,
        blocks=blocks,
        per_row=scores.shape[1] // 4,
        stride=scores.shape[1],
    )
    return partial(tally_of_fours, torch.stack([statistics.sum(0), statistics.amax(0)]))


def tally_of_fours(totals: torch.Tensor) -> Tally:
    """The sums of what the programs say, and the largest, float64 [2, STATISTICS], once they are there."""
    sums, largest = totals.tolist()
    if largest[UNUSABLE.value] > 0:
        raise UnusableScoresError
    return Tally(sums[OBJECTIVE.value], sums[EXCESS.value], largest[WORST_GAP.value], 0)


def settle_queue(
    shared: dict[str, Any],
    queue: torch.Tensor,
    state: torch.Tensor,
    prices: torch.Tensor,
    objective: torch.Tensor,
    duals: torch.Tensor,
    most: int,
    variants: tuple[Variant, Variant],
) -> Pending:
    """Settle the blocks whose numbers are in `queue` [places] int64, and add up everything, for one copy to the host.

    The queue may end with places where nobody waits. state, prices and objective are those of all blocks, see
    draft_kernel.py; the objectives of the queue are replaced.
    """
    places, form = len(queue), variants[0].constants
    programs = -(-places // (form["L"] // (form["RO"] * form["CO"])))
    statistics = torch.zeros((places, COUNT), dtype=torch.float64, device=queue.device)
    exact_prices = torch.empty((places, prices.shape[1]), dtype=torch.int64, device=queue.device)
    shared = shared | {"queue": queue, "exact_prices": exact_prices, "places": places}
    variants[0].launch(programs, **shared, prices=prices)
    variants[1].launch(programs, **shared, objective=objective, statistics=statistics, duals=duals, most=most)
    of_all = torch.stack([objective.sum(), state.amax().double()])
    totals = torch.cat([of_all, statistics.sum(0), statistics.amax(0)])
    return partial(tally_of_queue, totals, f"{shared['n']}:{form['M']}")


def tally_of_queue(totals: torch.Tensor, pattern: str) -> Tally:
    """What settle_queue has added up, once it is there."""
    kept, worst_state, *others = totals.tolist()
    sums, largest = others[:COUNT], others[COUNT:]
    if worst_state > 1:
        raise UnusableScoresError
    if sums[settle_kernel.FAILED.value] > 0:
        raise RuntimeError(f"no augmenting path in a {pattern} block: please report this")
    excess, repaired = sums[settle_kernel.EXCESS.value], sums[settle_kernel.REPAIRED.value]
    return Tally(kept, excess, largest[settle_kernel.GAP.value], int(repaired))


@cache
def padded_ties(n: int, m: int, side: int, device: torch.device) -> torch.Tensor:
    """The tie terms of ties.py, int32 [side, side], 0 outside of the block."""
    table = np.zeros((side, side), np.int32)
    table[:m, :m] = tie_table(n, m)
    return torch.from_numpy(table).to(device)
