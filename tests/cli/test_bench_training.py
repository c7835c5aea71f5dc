"""tsenor bench training, on a CPU: with no kernels, and with a stand-in for them."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from semi_structured import stand_in


def test_on_a_cpu(tsenor, llama):
    """Dense times of the model's shapes, and the truth about the rest."""
    outcome = tsenor("bench", "training", llama, "--tokens", 4, "--repeat", 1, "--device", "cpu")
    assert outcome.code == 0
    result = json.loads(outcome.out)
    inspected = json.loads(tsenor("inspect", llama, "--json").out)
    sizes = [tuple(one["shape"]) for one in inspected["tensors"] if one["prunable"] and one["transposable_m"]]
    assert {tuple(one["shape"]): one["count"] for one in result["shapes"]} == Counter(sizes)
    assert {one["reason"] for one in result["shapes"]} == {"torch has no 2:4 kernels on cpu"}
    assert all(one["dense"]["step"] > 0 and one["both_ways"] is None for one in result["shapes"])
    assert result["machine"]["device"] == "cpu"
    assert "only dense, as torch has no 2:4 kernels on cpu; sparsity gains nothing there" in outcome.err
    assert "sparse both ways" not in outcome.err


def test_with_kernels(tsenor, monkeypatch):
    """Where the stand-in is slower than dense, as it mostly is, that is said."""
    monkeypatch.setattr("tsenor_cli.training.packing.find_kernels", lambda _: stand_in())
    arguments = ("--size", "64x128", "--size", "64x128", "--size", "12x12", "--tokens", 8, "--repeat", 2)
    outcome = tsenor("bench", "training", *arguments, "--dtype", "float16")
    assert outcome.code == 0
    result = json.loads(outcome.out)
    sparse, odd = result["shapes"]
    assert (sparse["shape"], sparse["count"], sparse["reason"]) == ([64, 128], 2, None)
    assert sparse["both_ways"]["packing"] > 0
    assert odd["reason"] == "stand-in wants multiples of 8"
    slower = sum(sparse[way]["speed_up"] < 1 for way in ("dense", "forward_only", "both_ways"))
    assert outcome.err.count("nothing gained") == slower
    assert "12x12: only dense" in outcome.err
    assert "a step of all 3 takes" in outcome.err
    assert tsenor("bench", "training", *arguments, "-q").err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("model", "--size", "64x64"), 2, "not both"),
        (("--size", "0x64"), 2, "ROWSxCOLUMNS"),
        (("missing",), 3, "missing"),
        (("--device", "tpu"), 2, "not known"),
    ],
)
def test_mistakes(tsenor, arguments, code, message):
    outcome = tsenor("bench", "training", *arguments)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (code, "", 1)
    assert message in outcome.err


def test_wrong_products_are_exit_4(tsenor, monkeypatch):
    right = stand_in()
    wrong = replace(right, pack=lambda weight: right.pack(2 * weight))
    monkeypatch.setattr("tsenor_cli.training.packing.find_kernels", lambda _: wrong)
    outcome = tsenor("bench", "training", "--size", "64x64", "--tokens", 8)
    assert (outcome.code, outcome.out) == (4, "")
    assert "sparse both ways: y is off by" in outcome.err
    assert "packing" not in outcome.err
