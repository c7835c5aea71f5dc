"""Which process writes which tensor, decided from sizes alone, so that all processes find the same.

Longest processing time first: the costliest goes to who has least (Graham, Bounds on multiprocessing timing anomalies,
SIAM J. Appl. Math. 1969), at most 4/3 of the best. A shard is written by the processes of one machine only: on network
file systems two clients that write to one page overwrite each other. So a machine gets whole shards, and its processes
share their tensors.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from tsenor_cli.checkpoint.plan import Plan, TensorPlan

T = TypeVar("T")
_PRUNED = 2.0  # times what copying a byte costs: measured at 2:4 on two cores (docs/measured.md)


def cost(item: TensorPlan) -> float:
    """Of pruning or copying a tensor without calibration, in bytes copied."""
    return item.tensor.nbytes * (_PRUNED if item.pruned else 1.0)


def share_out(plan: Plan, nodes: Sequence[Sequence[int]]) -> dict[str, int]:
    """The rank that writes each tensor, by name.

    Args:
        plan: all tensors.
        nodes: the ranks of every machine. With fewer shards than machines some have nothing to write.
    """
    found: dict[str, int] = {}
    for ranks, shards in zip(nodes, share_shards(plan, [len(ranks) for ranks in nodes]), strict=True):
        items = [item for item in plan.tensors if item.tensor.path in shards]
        for rank, names in zip(ranks, _share({i.tensor.name: cost(i) for i in items}, [1] * len(ranks)), strict=True):
            found |= dict.fromkeys(names, rank)
    return found


def share_shards(plan: Plan, strengths: Sequence[float]) -> list[set[Path]]:
    """Whole shards for workers, that of `strengths[i]` times as much work in set i."""
    costs: dict[Path, float] = {shard.path: 0.0 for shard in plan.checkpoint.shards}
    for item in plan.tensors:
        costs[item.tensor.path] += cost(item)
    return [set(part) for part in _share(costs, strengths)]


def loads(plan: Plan, writers: Mapping[str, int], size: int) -> list[float]:
    """The cost of what each of `size` processes writes."""
    found: dict[int, float] = defaultdict(float)
    for item in plan.tensors:
        found[writers[item.tensor.name]] += cost(item)
    return [found[rank] for rank in range(size)]


def balance(loads: Iterable[float]) -> float:
    """Mean over largest load: 1 when nobody waits for another."""
    found = list(loads)
    return sum(found) / len(found) / max(found) if max(found, default=0.0) > 0 else 1.0


def _share(costs: Mapping[T, float], strengths: Sequence[float]) -> list[list[T]]:
    """The costliest first, each to whom it makes busy the shortest; equal ones in their order."""
    parts: list[list[T]] = [[] for _ in strengths]
    idle = [(0.0, worker) for worker in range(len(strengths))]
    for key, amount in sorted(costs.items(), key=lambda pair: -pair[1]):
        load, worker = heapq.heappop(idle)
        parts[worker].append(key)
        heapq.heappush(idle, (load + amount / strengths[worker], worker))
    return parts
