"""--save-masks: the masks that are saved are those that were chosen, also where a kept weight is zero."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from checkpoints import add_tokenizer, load_whole, make_checkpoint, read_shards
from crash.harness import content
from safetensors.torch import save_file

from tsenor_cli import solve_mask
from tsenor_cli.checkpoint.maskfile import read_mask
from tsenor_cli.checkpoint.reader import open_checkpoint
from tsenor_cli.errors import TsenorError
from tsenor_cli.pipeline import plan_prune, predict, prune, verify
from tsenor_cli.specs import CalibrationSpec, Cluster, NMPattern, PruneSpec

# From [.., out, in] to the axes on disk, and back.
AXES = {
    "out_in": ((0, 1), (0, 1)),
    "in_out": ((1, 0), (1, 0)),
    "experts_in_out": ((0, 2, 1), (0, 2, 1)),
    "conv2d": ((2, 3, 0, 1), (2, 3, 0, 1)),
}


def mostly_zero(directory):
    """Nine of ten weights are zero, so that many a kept one is."""
    generator = torch.Generator().manual_seed(0)
    for file, tensors in read_shards(directory).items():
        for tensor in tensors.values():
            if tensor.ndim > 1:
                tensor[torch.rand(tensor.shape, generator=generator) < 0.9] = 0
        save_file(tensors, directory / file, metadata={"format": "pt"})
    return directory


def masks_of(directory, report):
    tensors = open_checkpoint(directory).tensors
    return {r.name: read_mask(tensors[r.name]) for r in report.tensors if r.action == "pruned"}


@pytest.mark.parametrize("transposable", [True, False])
@pytest.mark.parametrize(
    ("architecture", "layout"),
    [("llama", "out_in"), ("gpt2", "in_out"), ("gpt_oss", "experts_in_out"), ("resnet", "conv2d")],
)
def test_they_are_those_of_the_solver(architecture, layout, transposable, tmp_path, monkeypatch):
    """Against the masks of whole matrices; a run cuts them into bands."""
    monkeypatch.setattr("tsenor_cli.checkpoint.plan.BAND_BYTES", 4096)
    source, pattern = mostly_zero(make_checkpoint(architecture, tmp_path / "in")), NMPattern(2, 4, transposable)
    report = prune(PruneSpec(str(source), tmp_path / "out", pattern, save_masks=True))
    before = {name: tensor for tensors in read_shards(source).values() for name, tensor in tensors.items()}
    kept_zeros, layouts = 0, {record.name: record.layout for record in report.tensors}
    for name, mask in masks_of(tmp_path / "out", report).items():
        there, back = AXES[layouts[name]]
        matrices = before[name].permute(there)
        wanted = solve_mask(matrices, "2:4", absolute=True, transposable=transposable).mask
        assert torch.equal(mask, wanted.permute([back.index(axis) for axis in range(len(back))])), name
        kept_zeros += int((mask & (before[name] == 0)).sum())
    assert layout in layouts.values()
    assert kept_zeros > 1000
    check = verify(str(tmp_path / "out"), against=str(source))
    assert check.ok, check.failures
    assert all(tensor.masked and not tensor.exact for tensor in check.tensors)


@pytest.mark.parametrize("transposable", [True, False])
@pytest.mark.parametrize(
    ("architecture", "method"), [("llama", "sparsegpt"), ("gpt2", "alps"), ("gpt_oss", "alps"), ("qwen3_moe", "wanda")]
)
def test_calibrated_methods(architecture, method, transposable, tmp_path, text):
    """None of these weights becomes zero by chance: what is kept is what is not zero."""
    source = add_tokenizer(make_checkpoint(architecture, tmp_path / "in"))
    calibration = CalibrationSpec(str(text), samples=8, sequence_length=32)
    spec = PruneSpec(
        str(source), tmp_path / "out", NMPattern(2, 4, transposable), method, calibration=calibration, save_masks=True
    )
    report = prune(spec)
    after = {name: tensor for tensors in read_shards(tmp_path / "out").values() for name, tensor in tensors.items()}
    masks = masks_of(tmp_path / "out", report)
    assert len(masks) == report.summary.pruned_tensors > 0
    for name, mask in masks.items():
        assert torch.equal(mask, after[name] != 0), name
    check = verify(str(tmp_path / "out"))
    assert check.ok, check.failures


def test_kept_zeros_of_a_calibrated_method(tmp_path, text):
    """Most weights are zero; that verify finds exactly two in each group of every mask says that they count."""
    source = add_tokenizer(mostly_zero(make_checkpoint("gpt_oss", tmp_path / "in")))
    calibration = CalibrationSpec(str(text), samples=8, sequence_length=32)
    spec = PruneSpec(str(source), tmp_path / "out", NMPattern(2, 4), "wanda", calibration=calibration, save_masks=True)
    report = prune(spec)
    after = {name: tensor for tensors in read_shards(tmp_path / "out").values() for name, tensor in tensors.items()}
    assert (
        sum(int((mask & (after[name] == 0)).sum()) for name, mask in masks_of(tmp_path / "out", report).items()) > 1000
    )
    check = verify(str(tmp_path / "out"), against=str(source))
    assert check.ok, check.failures
    assert all(tensor.masked and not tensor.exact for tensor in check.tensors)


def test_nothing_else_changes(llama, tmp_path):
    spec = PruneSpec(str(llama), tmp_path / "without", NMPattern(2, 4))
    without = prune(spec)
    report = prune(replace(spec, output=tmp_path / "with", save_masks=True))
    found, wanted = content(tmp_path / "with"), content(tmp_path / "without")
    added = found.keys() - wanted.keys()
    assert added == {f"tsenor-masks/model-0000{i}-of-00004.safetensors" for i in (1, 2, 3)}, "the last has no weights"
    different = {name for name in wanted if found[name] != wanted[name]}
    assert different == {"tsenor-report.json", "README.md"}
    assert [replace(r, mask_sha256=None) == r for r in report.tensors] == [r.action == "kept" for r in report.tensors]
    assert report.identity != without.identity
    load_whole(tmp_path / "with")


def test_masks_of_other_weights_do_not_come_along(llama, tmp_path, tsenor):
    """Of an output that is pruned again, with and without masks; the original keeps its own."""
    once, again = tmp_path / "once", tmp_path / "again"
    spec = PruneSpec(str(llama), once, NMPattern(2, 4), save_masks=True)
    prune(spec)
    prune(replace(spec, model=str(once), output=again, pattern=NMPattern(1, 4), save_masks=False))
    assert not (again / "tsenor-masks").exists()
    assert verify(str(again), against=str(once)).ok
    prune(replace(spec, model=str(once), output=again, pattern=NMPattern(1, 4), overwrite=True))
    assert verify(str(again), against=str(once)).ok
    assert tsenor("inspect", once).code == 0


def test_their_bytes_are_foreseen(llama, tmp_path):
    spec = PruneSpec(str(llama), tmp_path / "out", NMPattern(2, 4), save_masks=True)
    plan, cluster = plan_prune(spec), Cluster(1, "h200")
    prune(spec)
    assert plan.output_bytes == sum(path.stat().st_size for path in spec.output.rglob("*.safetensors"))
    more = (
        predict(spec, plan, cluster).written_bytes
        - predict(spec, replace(plan, saves_masks=False), cluster).written_bytes
    )
    assert more == plan.pruned_parameters // 8


def test_there_has_to_be_room_for_them(llama, tmp_path, monkeypatch):
    spec = PruneSpec(str(llama), tmp_path / "out", NMPattern(2, 4))
    checkpoint = plan_prune(spec).checkpoint
    free = SimpleNamespace(free=checkpoint.nbytes + checkpoint.other_bytes)
    monkeypatch.setattr("tsenor_cli.checkpoint.staging.shutil.disk_usage", lambda _: free)
    with pytest.raises(TsenorError, match="free and the output needs"):
        prune(replace(spec, save_masks=True))
    prune(spec)


def test_the_command(llama, tsenor):
    done = tsenor("prune", llama, "--nm", "2:4", "--save-masks", "-q", "-o", "out")
    assert (done.code, done.out) == (0, "out\n")
    assert "the saved masks agree" in tsenor("verify", "out").out
