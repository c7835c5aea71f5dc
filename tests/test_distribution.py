"""Work is shared out evenly, whole shards to a machine, every tensor once, and always the same way."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path

import pytest

from tsenor_cli.checkpoint.plan import Plan, TensorPlan
from tsenor_cli.checkpoint.reader import Checkpoint
from tsenor_cli.checkpoint.shard import DiskTensor, Shard
from tsenor_cli.distribution import balance, cost, loads, share_out, share_shards


def plan_of(sizes):
    """Shards of tensors of these sizes in bytes, every third of them kept."""
    items, shards = [], []
    for number, shard in enumerate(sizes):
        path = Path(f"model-{number}.safetensors")
        tensors = [DiskTensor(f"{number}.{i}", path, "BF16", (n // 2,), 0, n) for i, n in enumerate(shard)]
        shards.append(Shard(path, b"", {}, tuple(tensors)))
        items += [TensorPlan(t, "ignored" if i % 3 == 2 else None) for i, t in enumerate(tensors)]
    return Plan(Checkpoint(Path(), {}, tuple(shards)), tuple(items), {})


def drawn(seed, shards=6, tensors=9):
    draw = random.Random(seed)
    return plan_of([[2 * draw.randrange(1, 5000) for _ in range(draw.randrange(1, tensors))] for _ in range(shards)])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("nodes", [[[0]], [[0, 1]], [[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2, 3, 4]]])
def test_everything_once_and_a_shard_on_one_machine(seed, nodes):
    plan = drawn(seed)
    writers = share_out(plan, nodes)
    assert writers.keys() == plan.by_name.keys()
    node_of = {rank: node for node, ranks in enumerate(nodes) for rank in ranks}
    for shard in plan.checkpoint.shards:
        assert len({node_of[writers[tensor.name]] for tensor in shard.tensors}) == 1
    assert share_out(drawn(seed), nodes) == writers


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("workers", [2, 3])
def test_no_more_than_a_third_over_the_best(seed, workers):
    """Against the best of all ways there are. Graham's bound is 4/3 - 1/(3 workers)."""
    plan = drawn(seed, shards=1, tensors=8)
    costs = [cost(item) for item in plan.tensors]
    best = min(
        max(sum(c for c, at in zip(costs, places, strict=True) if at == w) for w in range(workers))
        for places in product(range(workers), repeat=len(costs))
    )
    shared = loads(plan, share_out(plan, [list(range(workers))]), workers)
    assert sum(shared) == pytest.approx(sum(costs))
    assert best <= max(shared) <= best * (4 / 3 - 1 / (3 * workers)) + 1e-9


def test_what_is_pruned_counts_more():
    kept, pruned = drawn(0).tensors[2], drawn(0).tensors[0]
    assert cost(kept) == kept.tensor.nbytes
    assert cost(pruned) > pruned.tensor.nbytes


def test_a_larger_machine_gets_more():
    plan = plan_of([[1000]] * 40)
    small, large = share_shards(plan, [1, 3])
    assert (len(small), len(large)) == (10, 30)
    assert small.isdisjoint(large)


def test_more_machines_than_shards():
    writers = share_out(plan_of([[10, 20]]), [[0], [1], [2]])
    assert len(set(writers.values())) == 1


def test_balance():
    assert balance([3.0, 3.0]) == 1.0
    assert balance([1.0, 3.0]) == pytest.approx(2 / 3)
    assert balance([0.0, 0.0]) == 1.0
