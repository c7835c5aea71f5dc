"""Gram matrices are those of the inputs, are shared where inputs are, and are not seen twice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tsenor_cli.calibration.statistics import Accumulator, Collector
from tsenor_cli.checkpoint.site import Site
from tsenor_cli.distributed import Team
from tsenor_cli.errors import InputRefused
from tsenor_cli.kernels import syrk

CPU = torch.device("cpu")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("features", [1, 5, 64, 511, 512, 1000])
def test_the_gram_matrix_of_several_batches(features, narrow):
    x = noise(300, features).to(torch.bfloat16)
    sums = Accumulator(features, CPU, gram=True)
    for batch in x.split(128):
        sums.add(batch if narrow and syrk.takes(batch) else batch.float())
    stats = sums.result()
    exact = x.double().T @ x.double()
    assert stats.tokens == 300
    assert stats.gram.dtype == torch.float64
    assert torch.allclose(stats.gram.triu(), exact.triu(), rtol=1e-5, atol=1e-5 * exact.diagonal().mean().item())
    assert torch.equal(stats.squared_norms, stats.gram.diagonal())


def test_blocks_of_columns_add_up_to_the_whole():
    """As processes have them, on whatever this processor multiplies bfloat16 numbers with."""
    x = noise(300, 700).to(torch.bfloat16)
    x = x if syrk.takes(x) else x.float()
    whole, parts = (Accumulator(700, CPU, gram=True) for _ in range(2))
    whole.add(x)
    for blocks in ([0, 1, 5], [2, 7], [3, 4, 6]):
        parts.add(x, blocks)
    assert torch.equal(whole.result().gram.triu(), parts.result().gram.triu())


def test_norms_alone():
    x = noise(300, 40)
    sums = Accumulator(40, CPU, gram=False)
    sums.add(x)
    stats = sums.result()
    assert stats.gram is None
    assert torch.allclose(stats.squared_norms, x.double().square().sum(0), rtol=1e-6)


def test_many_batches_lose_nothing():
    """Float32 totals would stand still once a batch is 2^24 times smaller than they are."""
    sums = Accumulator(1, CPU, gram=True)
    sums.add(torch.full((1, 1), 2.0**14))
    for _ in range(64):
        sums.add(torch.ones(1, 1))
    assert sums.result().gram.item() == 2.0**28 + 64


class Block(nn.Module):
    """q and k are given the same tensor; v a changed one; o something else, by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.same = True

    def forward(self, x):
        y = self.q(x) + self.k(x if self.same else x.clone())
        x.mul_(2)  # in place: the same object, and no longer the same values
        return self.o(input=y + self.v(x))


SITES = {name: Site(name) for name in "qkvo"}


def collect(block, *inputs):
    collector = Collector(block, SITES.values(), gram=True)
    for x in inputs:
        with torch.no_grad(), collector.watching():
            block(x.clone())
    return collector


def test_inputs_that_are_one_tensor_share_their_statistics():
    block, x, y = Block(), noise(10, 8), noise(6, 8, seed=1)
    stats = collect(block, x, y).results()
    assert stats[SITES["q"]] is stats[SITES["k"]]
    assert len({id(found) for found in stats.values()}) == 3
    both = torch.cat([x, y]).double()
    assert torch.allclose(stats[SITES["q"]].gram.triu(), (both.T @ both).triu())
    assert torch.allclose(stats[SITES["v"]].gram.triu(), (4 * both.T @ both).triu())
    assert {found.tokens for found in stats.values()} == {16}


def test_inputs_shared_only_sometimes_are_refused():
    block = Block()
    collector = collect(block, noise(4, 8))
    block.same = False
    with pytest.raises(InputRefused, match="for some texts"), torch.no_grad(), collector.watching():
        block(noise(4, 8))


def test_hooks_are_gone_afterwards():
    block = Block()
    collector = collect(block, noise(4, 8))
    with torch.no_grad():
        block(noise(4, 8))
    assert {found.tokens for found in collector.results().values()} == {4}
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_only_what_is_asked_for_is_seen():
    collector = Collector(Block(), [SITES["o"]], gram=False)
    with torch.no_grad(), collector.watching():
        collector._model(noise(4, 8))
    assert set(collector.results()) == {SITES["o"]}


class Counted(nn.Module):
    """Two modules, and something after them that costs; the second is called `times`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.times, self.ends = 1, 0

    def forward(self, x):
        y = self.a(x)
        for _ in range(self.times):
            y = self.b(y)
        self.ends += 1
        return y


@pytest.mark.parametrize(("times", "ends"), [(1, 1), (2, 3)])
def test_a_pass_ends_when_all_is_seen(times, ends):
    block = Counted()
    block.times = times
    collector = Collector(block, [Site("a"), Site("b")], gram=False)
    for seed in range(3):
        with torch.no_grad(), collector.watching():
            block(noise(4, 8, seed=seed))
    assert block.ends == ends  # called twice, a module may be called again
    stats = collector.results()
    assert stats[Site("a")].tokens == 12
    assert stats[Site("b")].tokens == 12 * times


class Twin(Team):
    """The first of two processes; the other one sees the same."""

    def __init__(self) -> None:
        super().__init__(0, 2)
        self._sent = []

    def gather(self, value):
        return [value, value]

    def give(self, tensor, like, device, source, receivers):  # noqa: ARG002
        if source == 0:
            self._sent.append(tensor.clone())
        else:
            tensor.copy_(self._sent.pop(0))
        return tensor


def test_a_module_that_is_called_twice_is_shared_twice():
    block, found = Counted(), []
    block.times = 2
    for team in (Team(), Twin()):
        collector = Collector(block, [Site("b")], gram=False, team=team)
        for batch in noise(3, 4, 8):
            with torch.no_grad(), collector.watching():
                block(batch)
            collector.share()
        found.append(collector.results()[Site("b")])
    alone, together = found
    assert together.tokens == 2 * alone.tokens == 2 * 3 * 4 * 2
    torch.testing.assert_close(together.squared_norms, 2 * alone.squared_norms)


def test_other_errors_are_not_swallowed():
    collector = Collector(Counted(), [Site("a")], gram=False)
    with pytest.raises(RuntimeError, match="shapes"), torch.no_grad(), collector.watching():
        collector._model(noise(4, 7))
