"""Time the parts of the exact kernel one by one, each repeated on one group of blocks that stays in the cache.

scripts/bench_phases.py 2:4 8:16 ...
"""

from __future__ import annotations

import sys
import time

import numba
import numpy as np

from tsenor_cli.kernels import exact, groups
from tsenor_cli.kernels.coarse import coarse_pointers, coarsen
from tsenor_cli.kernels.lanes import LANES, pointer
from tsenor_cli.kernels.passes import Ahead, call_dual_passes, dual_passes_address
from tsenor_cli.kernels.ties import tie_table

PARTS = ("gather", "quantise", "coarsen", "16-bit passes", "32-bit passes", "keep", "scatter")
SCORES = 4_000_000  # per measurement


@numba.njit(nogil=True)
def repeat(part, scores, n, m, schedule, addresses, group, ties, mask, times):  # noqa: ANN001, ANN201
    """Do one part `times` times."""
    columns, places, work = scores.shape[1], pointer(group.places), coarse_pointers(group.coarse)
    raw, q, kept, u, v = pointer(group.raw), pointer(group.q), pointer(group.kept), pointer(group.u), pointer(group.v)
    groups.find_places(0, LANES, columns, m, places)
    for _ in range(times):
        if part == 0:
            groups.gather(pointer(scores), columns, m, places, raw)
        elif part == 1:
            groups.quantise(raw, False, pointer(ties), m, q, pointer(group.factors))
        elif part == 2:
            coarsen(q, u, v, m, work)
        elif part == 3:
            call_dual_passes(addresses[1], work.q, work.u, work.v, schedule.coarse, schedule.furthest, Ahead(0, 0, 0))
        elif part == 4:
            call_dual_passes(addresses[0], q, u, v, schedule.first + schedule.last, schedule.furthest, Ahead(0, 0, 0))
        elif part == 5:
            groups.keep(
                raw, False, pointer(ties), q, u, v, n, m, LANES, kept, pointer(group.objective), pointer(group.counts)
            )
        else:
            groups.scatter(kept, columns, m, places, pointer(mask))


def main() -> None:
    print(f"  {'':6} " + " ".join(f"{part:>13}" for part in PARTS) + f" {'all':>7}")
    for text in sys.argv[1:]:
        n, m = map(int, text.split(":"))
        scores = np.abs(np.random.default_rng(0).standard_normal((m, LANES * m), dtype=np.float32))
        mask = np.zeros(scores.shape, np.uint8)
        exact.solve_transposable(scores, n, m, mask.view(np.bool_))
        group, queue, _ = exact.scratch_for(scores.dtype, tie_table(n, m))
        addresses = dual_passes_address(m, n), dual_passes_address(m, n, 16)
        schedule = exact.schedule(m)
        row = []
        for part, name in enumerate(PARTS):
            if schedule.coarse == 0 and name in {"coarsen", "16-bit passes"}:
                row.append(0.0)
                continue
            arguments = (part, scores, n, m, schedule, addresses, group, queue.visible, mask)
            repeat(*arguments, 1)
            times, best = max(1, SCORES // scores.size), np.inf
            for _ in range(5):
                started = time.perf_counter()
                repeat(*arguments, times)
                best = min(best, time.perf_counter() - started)
            row.append(best / times / scores.size * 1e9)
        print(f"  {text:6} " + " ".join(f"{value:13.3f}" for value in row) + f" {sum(row):7.2f}", flush=True)


if __name__ == "__main__":
    main()
