"""A run that was interrupted goes on, does nothing twice, and gives the bytes of one that was not."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import add_tokenizer, make_checkpoint
from crash.harness import content

from tsenor_cli.errors import OutputUnavailable
from tsenor_cli.layerwise import Layerwise
from tsenor_cli.observer import Observer
from tsenor_cli.pipeline import prune
from tsenor_cli.recipe import load_recipe
from tsenor_cli.specs import CalibrationSpec, NMPattern, PruneSpec
from tsenor_cli.streaming import Streaming


class Stops(Observer):
    """Interrupts after so many tensors that were pruned, and counts them."""

    def __init__(self, after: int = -1) -> None:
        self._after, self._pruned = after, set()
        self.done: list[str] = []

    def planned(self, plan) -> None:
        self._pruned = {item.tensor.name for item in plan.pruned}

    def advanced(self, name, _nbytes) -> None:
        if name in self._pruned:
            if len(self.done) == self._after:
                raise KeyboardInterrupt
            self.done.append(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return add_tokenizer(make_checkpoint("llama", tmp_path_factory.mktemp("model") / "llama"))


@pytest.fixture
def specs(model, text, tmp_path):
    """What can be resumed, by name."""
    free = PruneSpec(str(model), tmp_path / "out", NMPattern(2, 4))
    calibration = CalibrationSpec(str(text), samples=4, sequence_length=16)
    calibrated = replace(free, method="sparsegpt", calibration=calibration, save_masks=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "nm: 2:4\nrules:\n- {match: '*.mlp.*', method: wanda}\n- {match: '*.0.self_attn.*', skip: true}\n"
    )
    found = load_recipe(recipe)
    mixed = replace(free, rules=found.rules, method="magnitude", calibration=calibration, eval_text=str(text))
    mixed = replace(mixed, save_masks=True)
    return {"data-free": free, "calibrated": calibrated, "mixed, and evaluated": mixed}


@pytest.fixture
def worked(monkeypatch):
    """A list that grows with every tensor that is really pruned, layer by layer or band by band."""
    found: list[object] = []

    def noting(room, name):
        real = getattr(room, name)
        monkeypatch.setattr(room, name, lambda *arguments: (found.append(1), real(*arguments))[1])

    noting(Streaming, "_prune_band")
    noting(Layerwise, "_prune_matrix")
    return found


@pytest.mark.parametrize("name", ["data-free", "calibrated", "mixed, and evaluated"])
def test_after_any_tensor(specs, name, tmp_path, worked):
    spec = specs[name]
    whole = Stops()
    prune(replace(spec, output=tmp_path / "whole"), whole)
    wanted, count = content(tmp_path / "whole"), len(set(whole.done))
    for after in range(1, count, 3 if name == "data-free" else 5):
        with pytest.raises(KeyboardInterrupt) as stopped:
            prune(spec, Stops(after))
        assert stopped.value.__notes__ == ["the same command with --resume goes on where this one stopped"]
        assert not spec.output.exists()
        worked.clear()
        prune(replace(spec, resume=True))
        assert len(worked) == count - after, "something was done twice"
        assert content(spec.output) == wanted
        shutil.rmtree(spec.output)


def test_interrupted_again_and_again(specs, tmp_path):
    spec = specs["calibrated"]
    prune(replace(spec, output=tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        prune(spec, Stops(2))
    for after in (4, 5, 9):  # what is there already counts
        with pytest.raises(KeyboardInterrupt):
            prune(replace(spec, resume=True), Stops(after))
    prune(replace(spec, resume=True))
    assert content(spec.output) == content(tmp_path / "whole")


def interrupted(spec):
    with pytest.raises(KeyboardInterrupt):
        prune(spec, Stops(2))
    return replace(spec, resume=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pattern": NMPattern(1, 4)}, "--nm was 2:4 transposable and is 1:4 transposable"),
        ({"pattern": NMPattern(2, 4, transposable=False)}, "--nm was 2:4 transposable and is 2:4 standard"),
        ({"method": "wanda"}, '--method was "sparsegpt" and is "wanda"'),
        ({"ignore": ("lm_head",)}, '--ignore was [] and is ["lm_head"]'),
        ({"damping": 0.1}, "--damping was 0.01 and is 0.1"),
        ({"update": False}, "--no-update was true and is false"),
        ({"save_masks": False}, "--save-masks was true and is false"),
        ({"solver": "entropic"}, '--solver was "exact" and is "entropic"'),
    ],
)
def test_other_options_are_another_run(specs, change, named):
    spec = interrupted(specs["calibrated"])
    with pytest.raises(OutputUnavailable, match=re.escape(named)):
        prune(replace(spec, **change))


def test_what_decides_nothing_may_change(specs):
    spec = interrupted(specs["calibrated"])
    prune(replace(spec, memory_budget=2**40))
    assert spec.output.is_dir()


def test_another_text_is_another_run(specs, text, tmp_path):
    spec = interrupted(specs["calibrated"])
    (tmp_path / "other.txt").write_text(text.read_text().swapcase())
    assert spec.calibration is not None
    other = replace(spec.calibration, source=str(tmp_path / "other.txt"))
    with pytest.raises(OutputUnavailable, match="the calibration text was 4 windows"):
        prune(replace(spec, calibration=other))
    shutil.copy(text, tmp_path / "same.txt")  # where a text lies does not matter
    prune(replace(spec, calibration=replace(spec.calibration, source=str(tmp_path / "same.txt"))))


def test_another_version_is_another_run(specs, monkeypatch):
    spec = interrupted(specs["data-free"])
    monkeypatch.setattr("tsenor_cli.identity.__version__", "9.9")
    with pytest.raises(OutputUnavailable, match=re.escape("tsenor was 0.1.0 and is 9.9")):
        prune(spec)


@pytest.mark.parametrize("file", ["model-00002-of-00004.safetensors", "config.json", "tokenizer.json"])
def test_a_model_that_changed_is_another_run(specs, tmp_path, file):
    model = shutil.copytree(specs["data-free"].model, tmp_path / "model", copy_function=shutil.copy2)
    spec = interrupted(replace(specs["data-free"], model=str(model)))
    facts = (model / file).stat()
    raw = (model / file).read_bytes()
    (model / file).write_bytes(raw + b" " if file.endswith("json") else raw[:-1] + bytes([raw[-1] ^ 1]))
    os.utime(model / file, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    with pytest.raises(OutputUnavailable, match=re.escape(f"{file} in the model was")):
        prune(spec)


def test_where_the_model_lies_does_not_matter(specs, tmp_path):
    spec = interrupted(specs["data-free"])
    model = shutil.copytree(spec.model, tmp_path / "moved", copy_function=shutil.copy2)
    prune(replace(spec, model=str(model)))
    assert json.loads((spec.output / "tsenor-report.json").read_text())["model"]["source"] == str(model)


@pytest.mark.parametrize("folder", [".", "tsenor-masks"])
@pytest.mark.parametrize("damage", ["a flipped bit", "zeros", "cut short"])
def test_what_the_journal_says_is_not_believed_before_the_bytes_are_right(specs, tmp_path, damage, folder):
    """After a power cut the journal may be ahead of the tensors that it speaks of."""
    spec = replace(specs["data-free"], save_masks=True)
    prune(replace(spec, output=tmp_path / "whole"))
    spec = interrupted(spec)
    partial = Path(f"{spec.output}.tsenor-partial")
    notes = (json.loads(line)["tensor"] for line in (partial / "journal").read_text().splitlines()[1:])
    first = next(note for note in notes if note["action"] == "pruned")
    shard = partial / "checkpoint" / folder / first["file"]
    raw = bytearray(shard.read_bytes())
    start = int.from_bytes(raw[:8], "little") + 8
    if damage == "a flipped bit":
        raw[start:] = bytes(byte ^ 1 for byte in raw[start:])
    elif damage == "zeros":
        raw[start:] = bytes(len(raw) - start)
    shard.write_bytes(raw[:start] if damage == "cut short" else raw)
    prune(spec)
    assert content(spec.output) == content(tmp_path / "whole")
