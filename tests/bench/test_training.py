"""The benchmark of training shows times only for products that are right, and adds up."""

import json

import pytest
import torch
from semi_structured import stand_in, two_of_four

from tsenor_cli.bench.training import LLAMA_8B_LAYER, Milliseconds, ShapeTimes, time_shape, total_ms
from tsenor_cli.errors import CheckFailed
from tsenor_cli.training import packing
from tsenor_cli.training.packing import Kernels, Packed

pytestmark = pytest.mark.slow
QUICK = {"tokens": 12, "dtype": torch.float32, "device": torch.device("cpu"), "repeat": 2, "seed": 0}


def test_all_ways_are_timed_beside_each_other(monkeypatch):
    packed = []
    monkeypatch.setattr(packing, "find_kernels", lambda _: stand_in(packed))
    found = time_shape((32, 64), 3, **QUICK)
    assert (found.shape, found.count, found.reason) == ((32, 64), 3, None)
    assert found.dense.speed_up == 1
    for took in (found.dense, found.forward_only, found.both_ways):
        assert min(took.packing, took.forward, took.backward, took.speed_up) > 0
        assert took.step >= max(took.packing, took.forward, took.backward)
    assert 0 <= found.worst_error < 1e-6
    assert len(packed) == 1 + 3 + 2  # the check of the products, warm-up, the rounds
    assert torch.equal(packed[0], packed[-1])
    json.dumps(found.to_dict(), allow_nan=False)


def other(weight):
    return two_of_four(*weight.shape, seed=1).to(weight.dtype)


def one_entry_less(weight):
    weight = weight.clone()
    weight.view(-1)[weight.abs().argmax()] = 0
    return weight


@pytest.mark.parametrize("spoil", [other, one_entry_less, lambda w: w * 1.01, lambda w: w * torch.nan])
@pytest.mark.parametrize("what", ["y", "dx", "forward only"])
def test_wrong_products_are_not_timed(monkeypatch, spoil, what):
    right = stand_in()

    def pack(weight):
        return Packed(spoil(weight), weight) if what == "y" else Packed(weight, spoil(weight))

    def pack_rows(weight):
        return Packed(spoil(weight), weight)

    packs = (right.pack, pack_rows) if what == "forward only" else (pack, right.pack_rows)
    monkeypatch.setattr(packing, "find_kernels", lambda _: Kernels("wrong", right.dtypes, 8, *packs))
    monkeypatch.setattr("tsenor_cli.bench.training._time", lambda *_: pytest.fail("timed"))
    way, product = ("forward only", "y") if what == "forward only" else ("both ways", what)
    with pytest.raises(CheckFailed, match=rf"\[32, 64\], sparse {way}: {product} is off by .*nothing was timed"):
        time_shape((32, 64), 1, **QUICK)


def test_rounding_is_no_error(monkeypatch):
    monkeypatch.setattr(packing, "find_kernels", lambda _: stand_in())
    for dtype in (torch.bfloat16, torch.float16):
        found = time_shape((64, 256), 1, **QUICK | {"dtype": dtype})
        assert 0 < found.worst_error <= 2 * torch.finfo(dtype).eps


def test_without_kernels_dense_alone_is_timed(monkeypatch):
    found = time_shape((12, 20), 1, **QUICK)
    assert found.dense.step > 0
    assert (found.forward_only, found.both_ways, found.worst_error) == (None, None, None)
    assert found.reason == "torch has no 2:4 kernels on cpu"
    half = Kernels("halves", frozenset({torch.float16}), 16, None, None)
    monkeypatch.setattr(packing, "find_kernels", lambda _: half)
    assert time_shape((16, 16), 1, **QUICK).reason == "halves has no kernels for torch.float32"
    assert time_shape((16, 24), 1, **QUICK | {"dtype": torch.float16}).reason == "halves wants multiples of 16"


def test_sums():
    """Each shape as often as it is there, and dense where it has to be."""

    def took(step):
        return Milliseconds(0, 0, 0, step, 1)

    sparse = ShapeTimes((8, 8), 2, took(10), took(8), took(5), 0.0, None)
    dense = ShapeTimes((4, 4), 3, took(1), None, None, None, "too small")
    assert total_ms([sparse, dense]) == {"dense": 23, "forward_only": 19, "both_ways": 13}
    assert sum(count * out * inputs for (out, inputs), count in LLAMA_8B_LAYER.items()) == 218_103_808


@pytest.mark.gpu
def test_on_a_card():
    options = QUICK | {"dtype": torch.bfloat16, "device": torch.device("cuda"), "tokens": 4096}
    found = time_shape((1024, 2048), 1, **options)
    assert found.reason is None
    assert found.both_ways.step > 0
