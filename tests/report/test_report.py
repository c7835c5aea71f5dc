"""The report says what happened, in a schema that is shipped; the model card is valid for the hub."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import torch
from checkpoints import read_shards
from huggingface_hub import ModelCard

import tsenor_cli
from tsenor_cli.masks.apply import energy
from tsenor_cli.pipeline import prune
from tsenor_cli.specs import NMPattern, PruneSpec


def pruned(model, output, **options):
    prune(PruneSpec(str(model), output, NMPattern(2, 4), **options))
    return json.loads((output / "tsenor-report.json").read_text())


def test_it_fits_the_schema(llama, tmp_path):
    schema = json.loads((files("tsenor_cli.report") / "schema.json").read_text())
    report = pruned(llama, tmp_path / "out", ignore=("*.mlp.up_proj",))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(report, schema)
    del report["tensors"][0]["reason"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report, schema)


def test_its_numbers_are_those_of_the_files(llama, tmp_path):
    report = pruned(llama, tmp_path / "out")
    before = {name: t.double() for shard in read_shards(llama).values() for name, t in shard.items()}
    after = {name: t.double() for shard in read_shards(tmp_path / "out").values() for name, t in shard.items()}
    kept = total = 0.0
    for record in report["tensors"]:
        old, new = before[record["name"]], after[record["name"]]
        if record["action"] == "kept":
            assert torch.equal(old, new)
            assert record["reason"]
            continue
        assert record["zeros"] == int((new == 0).sum())
        assert record["kept_energy"] == pytest.approx(float(new.square().sum() / old.square().sum()), rel=1e-5)
        assert record["objective"] == pytest.approx(float(new.abs().sum()), rel=1e-9)
        assert record["objective"] <= record["upper_bound"] <= record["objective"] * (1 + 1e-6)
        kept, total = kept + float(new.square().sum()), total + float(old.square().sum())
    assert report["summary"]["kept_energy"] == pytest.approx(kept / total, rel=1e-5)
    assert report["summary"]["peak_memory_bytes"] > 50e6
    assert [record["name"] for record in report["tensors"]] == [
        tensor for shard in sorted(read_shards(llama)) for tensor in _on_disk_order(llama / shard)
    ]


def _on_disk_order(path):
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__", None)
    return sorted(header, key=lambda name: header[name]["data_offsets"])


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1.0, 1e19, 1e38])
def test_energy_neither_overflows_nor_underflows(scale):
    weight = torch.randn(64, 100, generator=torch.Generator().manual_seed(0)).clamp(-3, 3) * scale
    assert energy(weight) == pytest.approx(float(weight.double().square().sum()), rel=1e-12)
    assert energy(torch.zeros(4, 4)) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (7,), (3, 5), (2, 700, 3), (1000, 1031)])
def test_energy_of_any_shape_is_that_of_python(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = math.fsum(w**2 for w in weight.double().flatten().tolist())
    assert energy(weight) == pytest.approx(wanted, rel=1e-14)
    assert energy(weight.mT if weight.ndim > 1 else weight) == pytest.approx(wanted, rel=1e-14)


def test_the_same_input_gives_the_same_bytes(llama, tmp_path):
    reports = [pruned(llama, tmp_path / name) for name in ("a", "b")]
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file() and not path.name.startswith("tsenor-report"):
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    for report in reports:
        for cost in ("seconds", "stages", "peak_memory_bytes", "read_bytes", "written_bytes"):
            report["summary"].pop(cost)
        for record in report["tensors"]:
            record.pop("seconds"), record.pop("solver_seconds")
    assert reports[0] == reports[1]


def test_the_card_keeps_what_the_original_said(llama, tmp_path):
    (llama / "README.md").write_text("---\nlicense: mit\ntags:\n- tiny\n---\n\n# Tiny llama\n\nHello.\n")
    pruned(llama, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit"
    assert card.data.tags == ["tiny", "sparse", "tsenor", "2:4", "transposable"]
    assert "Hello." in card.text
    assert "2:4 sparse" in card.text


ODD_METADATA = ["---\ntags: [{a: 1}, [b], c]\n---\n", "---\neval_results: 5\n---\n", "---\nto_yaml: 5\n---\n"]


@pytest.mark.parametrize(
    "text", ["", "# no metadata", "---\n: [\n---\nbroken", "---\n- a\n---\nlist", "\xff\xfe", *ODD_METADATA]
)
def test_any_original_card_is_survived(llama, tmp_path, text):
    (llama / "README.md").write_text(text, encoding="latin-1")
    pruned(llama, tmp_path / "out")
    assert "sparse" in ModelCard.load(tmp_path / "out" / "README.md").data.tags


def test_public_names_are_there():
    assert all(callable(getattr(tsenor_cli, name)) for name in tsenor_cli.__all__)
    assert Path(tsenor_cli.__file__).parent.name == "tsenor_cli"
