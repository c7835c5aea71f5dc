"""The tile and the histogram of a report, held against the files."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import make_checkpoint, read_shards

from tsenor_cli.pipeline import prune
from tsenor_cli.specs import NMPattern, PruneSpec


def run(model, output, n, m, **options):
    prune(PruneSpec(str(model), output, NMPattern(n, m, **options)))
    report = json.loads((output / "tsenor-report.json").read_text())
    return report, *({k: t for shard in read_shards(d).values() for k, t in shard.items()} for d in (model, output))


@pytest.mark.parametrize(("n", "m", "side"), [(2, 4, 8), (1, 3, 9), (8, 16, 16), (16, 32, 32)])
def test_the_tile_is_the_corner_of_the_first_pruned_tensor(llama, tmp_path, n, m, side):
    report, before, after = run(llama, tmp_path / "out", n, m, transposable=m != 3)
    tile = report["tile"]
    assert tile["tensor"] == next(r["name"] for r in report["tensors"] if r["action"] == "pruned")
    old, new = (tensors[tile["tensor"]][:side, :side].float() for tensors in (before, after))
    shown = torch.tensor([[float(number) for number in row.split()] for row in tile["weights"]])
    assert shown.shape == old.shape == (side, side)
    assert torch.allclose(shown, old, rtol=1e-3)
    assert [[char == "1" for char in row] for row in tile["kept"]] == (new != 0).tolist()


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_oss"])
def test_it_is_seen_as_out_by_in_however_it_lies_on_disk(architecture, tmp_path):
    model = make_checkpoint(architecture, tmp_path / "model")
    report, before, _ = run(model, tmp_path / "out", 2, 4)
    record = next(r for r in report["tensors"] if r["action"] == "pruned")
    weight = before[record["name"]]
    matrix = weight.reshape(-1, *weight.shape[-2:])[0]
    matrix = matrix.T if record["layout"].endswith("in_out") else matrix
    shown = torch.tensor([[float(number) for number in row.split()] for row in report["tile"]["weights"]])
    assert torch.allclose(shown, matrix[:8, :8].float(), rtol=1e-3)
    for lines in (report["tile"]["kept"], map("".join, zip(*report["tile"]["kept"], strict=True))):
        assert all(line[:4].count("1") == line[4:].count("1") == 2 for line in lines)


def test_the_histogram_counts_every_weight_of_small_tensors(llama, tmp_path):
    report, before, after = run(llama, tmp_path / "out", 2, 4)
    found, names = report["histogram"], [r["name"] for r in report["tensors"] if r["action"] == "pruned"]
    assert found["tensors"] == len(names)
    assert found["weights"] == sum(found["before"]) == sum(before[name].numel() for name in names)
    assert sum(found["after"]) == sum(int((after[name] != 0).sum()) for name in names)
    expected = torch.zeros(80)
    for name in names:
        weight = before[name].float()
        expected += torch.histc((weight / weight.std(correction=0)).clamp(-4, 4), 80, -4, 4)
    assert found["before"] == expected.long().tolist()


def test_nothing_pruned_nothing_shown(llama, tmp_path):
    model = tmp_path / "odd"
    llama.rename(model)
    report, _, _ = run(model, tmp_path / "out", 2, 4)
    assert report["tile"] is not None
    spec = PruneSpec(str(model), tmp_path / "none", NMPattern(2, 4), ignore=("*",))
    with pytest.raises(Exception, match="nothing"):
        prune(spec)
