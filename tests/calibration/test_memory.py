"""What a calibrated run is said to need, part by part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import HIDDEN, VOCAB, make_checkpoint

from tsenor_cli.calibration.memory import expected_memory
from tsenor_cli.checkpoint.plan import make_plan
from tsenor_cli.checkpoint.reader import open_checkpoint
from tsenor_cli.device import CPU, computed_in
from tsenor_cli.specs import CalibrationSpec, NMPattern, PruneSpec


def parts(architecture, tmp_path, method="sparsegpt"):
    directory = tmp_path / architecture
    if not directory.exists():
        make_checkpoint(architecture, directory)
    spec = PruneSpec(
        str(directory), Path("out"), NMPattern(2, 4, transposable=False), method, calibration=CalibrationSpec("x")
    )
    return expected_memory(make_plan(open_checkpoint(directory), spec), samples=10, length=32)


def test_the_parts_of_a_llama(tmp_path):
    """By hand: hidden 64, feed-forward 96, keys and values of 32; q, k and v read one input, gate and up another."""
    found = parts("llama", tmp_path)
    assert found["Gram matrices of a layer"] == 8 * (3 * HIDDEN**2 + 96**2)
    layer = 2 * HIDDEN**2 + 2 * 32 * HIDDEN + 3 * 96 * HIDDEN + 2 * HIDDEN
    itemsize = computed_in(torch.bfloat16, CPU).itemsize
    assert found["two decoder layers"] == itemsize * 2 * layer
    assert found["outside the decoder layers"] == itemsize * (2 * VOCAB * HIDDEN + HIDDEN)
    assert found["hidden states"] == itemsize * 10 * 32 * HIDDEN


def test_norms_need_no_gram_matrices(tmp_path):
    assert parts("llama", tmp_path, "wanda")["Gram matrices of a layer"] == 0


def test_every_expert_counts(tmp_path):
    """Mixtral: 4 experts of width 32; attention as above. Gate and up of one expert read the same."""
    found = parts("mixtral", tmp_path)
    assert found["Gram matrices of a layer"] == 8 * (2 * HIDDEN**2 + 4 * (HIDDEN**2 + 32**2))


def test_without_a_look_at_the_model_every_weight_counts(tmp_path, monkeypatch):
    """Some models cannot run without values; then nothing is known to be shared."""

    def cannot(*_, **__):
        raise RuntimeError("needs values")

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", cannot)
    assert parts("llama", tmp_path)["Gram matrices of a layer"] == 8 * (6 * HIDDEN**2 + 96**2)


@pytest.mark.parametrize(("method", "more"), [("alps", True), ("wanda", False)])
def test_methods_differ_in_their_work(method, more, tmp_path, monkeypatch):
    monkeypatch.setattr("tsenor_cli.calibration.memory.BATCH_TOKENS", 0)
    work = {name: parts("llama", tmp_path, name)["a batch, or work on a weight"] for name in (method, "sparsegpt")}
    assert (work[method] > work["sparsegpt"]) is more
