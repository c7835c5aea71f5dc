"""Whole runs on a GPU, against the same on the CPU. scripts/gpu-check runs these."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from checkpoints import add_tokenizer, make_checkpoint

from tsenor_cli.masks.solve import solve_mask
from tsenor_cli.pipeline import evaluate, prune, verify
from tsenor_cli.specs import CalibrationSpec, NMPattern, PruneSpec

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path, generator = tmp_path_factory.mktemp("text") / "text.txt", random.Random(0)
    path.write_text(" ".join("".join(generator.choices("abcdefgh ijklmnop,.", k=7)) for _ in range(400)))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return add_tokenizer(make_checkpoint("llama", tmp_path_factory.mktemp("model") / "llama"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("transposable", [True, False])
@pytest.mark.parametrize("band", [1, 1 << 26])
def test_without_calibration_every_byte_is_the_same(architecture, transposable, band, tmp_path, monkeypatch):
    source, pattern = make_checkpoint(architecture, tmp_path / "source"), NMPattern(2, 4, transposable)
    monkeypatch.setattr("tsenor_cli.streaming.GPU_BAND_BYTES", band)
    for device in ("cuda", "cpu"):
        report = prune(PruneSpec(str(source), tmp_path / device, pattern, device=device, save_masks=True))
        assert report.device.startswith(device)
    for folder in (".", "tsenor-masks"):
        for path in (tmp_path / "cpu" / folder).glob("*.safetensors"):
            assert (tmp_path / "cuda" / folder / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("nm", ["2:4", "8:16"])
@pytest.mark.parametrize("transposable", [True, False])
def test_calibrated_methods_are_as_good(method, nm, transposable, model, text, tmp_path):
    """Sums are rounded otherwise, so weights differ; what they lose of the output does not."""
    reports = {}
    for device in ("cuda", "cpu"):
        spec = PruneSpec(
            str(model),
            tmp_path / device,
            NMPattern.parse(nm, transposable=transposable),
            method,
            calibration=CalibrationSpec(str(text), samples=24, sequence_length=32),
            device=device,
        )
        reports[device] = prune(spec)
        assert verify(str(tmp_path / device), against=str(model)).ok
    if method == "wanda":
        assert reports["cuda"].summary.kept_energy == pytest.approx(reports["cpu"].summary.kept_energy, rel=0.01)
    else:
        assert reports["cuda"].summary.error == pytest.approx(reports["cpu"].summary.error, rel=0.02)


def test_perplexity(model, text):
    (there,), (here,) = (evaluate([str(model)], str(text), device=device) for device in ("cuda", "cpu"))
    assert there.mean_loss == pytest.approx(here.mean_loss, rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"transposable": False}, {"solver": "entropic"}])
def test_numpy_in_numpy_out(options):
    scores = np.random.default_rng(0).random((32, 48), np.float32)
    there, here = (solve_mask(scores, "4:8", device=device, **options) for device in ("cuda", "cpu"))
    assert isinstance(there.mask, np.ndarray)
    if options.get("solver") != "entropic":
        assert np.array_equal(there.mask, here.mask)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_gpu_than_the_current_one():
    scores = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).abs()
    found = solve_mask(scores.to("cuda:1"), "8:16")
    assert found.mask.device == torch.device("cuda:1")
    assert torch.equal(found.mask.cpu(), solve_mask(scores, "8:16").mask)


def test_little_memory_means_smaller_bands(monkeypatch):
    scores = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).abs()
    whole = solve_mask(scores, "8:16", device="cuda")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    monkeypatch.setattr("tsenor_cli.masks.on_gpu._free_bytes", lambda *_: 1 << 40)  # it believes to have more
    torch.cuda.set_per_process_memory_fraction(100 * 2**20 / total)
    try:
        cut = solve_mask(scores, "8:16", device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(cut.mask, whole.mask)
