"""Who takes part: our solvers, the baselines of the TSENOR paper, and torch's row-wise selection as a yardstick."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_all_start_methods, get_context

import torch

from tsenor_cli.bench import CONTENDERS
from tsenor_cli.errors import UsageError
from tsenor_cli.masks.baselines import exhaustive, flow, heuristics, linear_program, plain_torch
from tsenor_cli.masks.blocks import from_blocks, to_blocks
from tsenor_cli.masks.solve import solve_mask
from tsenor_cli.specs import NMPattern

Solve = Callable[[torch.Tensor, NMPattern], torch.Tensor | None]  # scores [out, in] → mask, or None for a yardstick
SolveBlocks = Callable[[torch.Tensor, int], torch.Tensor]  # see masks/baselines


@dataclass(frozen=True)
class Contender:
    """A way to make transposable masks."""

    name: str
    what: str
    solve: Solve
    whole: bool = False  # always measured on all blocks, several times


@contextmanager
def contenders(names: tuple[str, ...], pattern: NMPattern, processes: int) -> Iterator[list[Contender]]:
    """Those of `names` that can solve `pattern`; what is serial by nature runs in `processes` processes."""
    if unknown := sorted(set(names) - set(CONTENDERS)):
        raise UsageError(f"unknown solver {unknown[0]!r}", f"known: {', '.join(CONTENDERS)}")
    start = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"  # Windows has the second alone
    with ProcessPoolExecutor(processes, mp_context=get_context(start)) as pool:
        list(pool.map(abs, range(processes)))  # started before anybody looks at a clock
        shared = partial(_in_processes, pool, processes)
        known = [
            Contender("exact", "tsenor, proven optimal", partial(_ours, solver="exact"), whole=True),
            Contender("entropic", "tsenor, the pipeline of the paper", partial(_ours, solver="entropic"), whole=True),
            _baseline("flow", "min-cost flow, OR-tools", partial(shared, flow.solve)),
            _baseline("highs", "linear program, HiGHS", partial(shared, linear_program.solve_highs)),
            _baseline("pdlp", "linear program, PDLP, rounded", partial(shared, linear_program.solve_pdlp)),
            _baseline("exhaustive", "all masks tried", exhaustive.solve),
            _baseline("plain-torch", "the pipeline of the paper in torch operators", plain_torch.solve),
            _baseline("two-approximation", "greedy on the scores", heuristics.two_approximation),
            _baseline("bi-nm", "rows, then columns", heuristics.bi_nm),
            _baseline("max1000", "best of 1000 random masks", heuristics.max_of_random),
            Contender("topk", "yardstick: torch.topk along rows, no mask", _topk, whole=True),
        ]
        yield [one for one in known if one.name in names and (one.name != "exhaustive" or pattern.m == 4)]


def _ours(scores: torch.Tensor, pattern: NMPattern, solver: str) -> torch.Tensor:
    return solve_mask(scores, pattern, solver=solver).mask


def _topk(scores: torch.Tensor, pattern: NMPattern) -> None:
    scores.view(len(scores), -1, pattern.m).topk(pattern.n, 2).indices  # noqa: B018  (the work is what is wanted)


def _baseline(name: str, what: str, solve: SolveBlocks) -> Contender:
    def run(scores: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
        return from_blocks(solve(to_blocks(scores, pattern.m), pattern.n), scores.shape)

    return Contender(name, what, run)


def _in_processes(
    pool: ProcessPoolExecutor, processes: int, solve: SolveBlocks, blocks: torch.Tensor, n: int
) -> torch.Tensor:
    parts = [part.contiguous().numpy() for part in blocks.float().tensor_split(processes)]
    return torch.cat([torch.from_numpy(mask) for mask in pool.map(partial(_solve_part, solve, n), parts)])


def _solve_part(solve: SolveBlocks, n: int, blocks: object) -> object:
    """Arrays travel between processes as bytes; tensors would as shared memory."""
    torch.set_num_threads(1)
    return solve(torch.as_tensor(blocks), n).numpy()
