"""Jobs that know nothing of each other make parts, and merge puts them together: the bytes of one run."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from crash.harness import content

from tsenor_cli.errors import InputRefused
from tsenor_cli.observer import Observer
from tsenor_cli.pipeline import merge, prune
from tsenor_cli.specs import NMPattern, Part, PruneSpec


@pytest.fixture
def spec(llama, tmp_path):
    (llama / "README.md").write_text("---\nlicense: mit\n---\n\n# Tiny\n")
    return PruneSpec(str(llama), tmp_path / "out", NMPattern(2, 4), save_masks=True)


def make_parts(spec, count, numbers=None):
    for number in numbers or range(1, count + 1):
        prune(replace(spec, part=Part(number, count)))


@pytest.mark.parametrize("parts", [1, 3, 6])  # of four shards
def test_the_bytes_of_one_run(spec, tmp_path, parts):
    prune(replace(spec, output=tmp_path / "whole"))
    make_parts(spec, parts)
    report = merge(spec.output)
    merged, whole = content(spec.output), content(tmp_path / "whole")
    facts, wanted = (json.loads(found.pop("tsenor-report.json")) for found in (merged, whole))
    assert merged == whole
    assert facts.pop("histogram")["weights"] == wanted.pop("histogram")["weights"]  # drawn from each part
    for key in ("objective", "upper_bound", "kept_energy", "gap"):
        assert facts["summary"].pop(key) == pytest.approx(wanted["summary"].pop(key), rel=1e-9, abs=1e-12)
    assert facts == wanted
    assert report.processes == parts
    assert list(tmp_path.glob("*part*")) == []


@pytest.mark.parametrize("linked", [True, False])
def test_a_merge_that_fails_leaves_the_parts(spec, tmp_path, monkeypatch, linked):
    make_parts(spec, 2)
    before = {path: content(path) for path in tmp_path.glob("*part*")}
    with monkeypatch.context() as patch:
        if not linked:
            patch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
        patch.setattr("tsenor_cli.pipeline.model_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge(spec.output)
    assert not spec.output.exists()
    assert {path: content(path) for path in tmp_path.glob("*part*")} == before
    merge(spec.output)


def test_a_merge_that_is_stopped_while_parts_go_is_finished_by_the_next(spec, monkeypatch):
    """Before everything that is removed, in turn."""
    removed = []

    def watched(remove, stop_at):
        def run(path, *given, **options):
            if removed or ".part-" in str(path):
                if len(removed) == stop_at:
                    raise KeyboardInterrupt
                removed.append(path)
            return remove(path, *given, **options)

        return run

    for step in count():
        make_parts(spec, 2)
        removed.clear()
        with monkeypatch.context() as patch:
            for where, name in ((Path, "rename"), (os, "unlink"), (os, "rmdir")):
                patch.setattr(where, name, watched(getattr(where, name), step))
            with suppress(KeyboardInterrupt):
                merge(spec.output)
                break
        whole = content(spec.output)
        merge(spec.output)
        assert content(spec.output) == whole
        assert list(spec.output.parent.glob("*.part-*")) == []
        shutil.rmtree(spec.output)
    assert len(removed) == step > 12


def merge_stopped_at(name, spec, monkeypatch):
    """Stop when a part with this in its name is to be removed."""
    remove = shutil.rmtree

    def stop(path, *given, **options):
        if name in str(path):
            raise KeyboardInterrupt
        remove(path, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            merge(spec.output)


def parts_left(spec):
    return [path.name for path in spec.output.parent.iterdir() if ".part-" in path.name]


def test_parts_that_were_going_when_their_output_went(spec, monkeypatch):
    """They are in nobody's way when all is made anew."""
    make_parts(spec, 2)
    merge_stopped_at(".part-", spec, monkeypatch)
    shutil.rmtree(spec.output)
    make_parts(spec, 2)
    merge(spec.output)
    assert parts_left(spec) == []


def test_a_part_that_is_made_again_while_parts_go(spec, monkeypatch):
    """As a job does that is queued once more."""
    make_parts(spec, 2)
    merge_stopped_at(".part-2", spec, monkeypatch)
    whole = content(spec.output)
    make_parts(spec, 2, [2])
    merge(spec.output)
    assert content(spec.output) == whole
    assert parts_left(spec) == []


@pytest.mark.parametrize("revision", ["c0ffee", None])
def test_parts_of_two_copies(spec, llama, tmp_path, revision):
    """A commit of the hub is the same wherever it has been fetched; of other files nobody knows."""
    for number, place in enumerate(("here", "there"), 1):
        copy = tmp_path / place / ("snapshots" if revision else "models") / "c0ffee"
        shutil.copytree(llama, copy, copy_function=shutil.copy)
        for path in copy.rglob("*"):
            os.utime(path, (number, number))
        make_parts(replace(spec, model=str(copy)), 2, [number])
    if revision is not None:
        merge(spec.output)
        return
    with pytest.raises(InputRefused) as caught:
        merge(spec.output)
    assert caught.value.code == "parts-differ"


def fails(outcome, code, *words):
    assert outcome.code == code
    assert outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err


def test_what_cannot_be_merged(tsenor, spec, tmp_path):
    fails(tsenor("merge", spec.output), 3, "there is no part", "--shard 1/N", "[missing-parts]")
    make_parts(spec, 3, [1, 3])
    fails(tsenor("merge", spec.output), 3, "part 2 of 3 is missing", "--shard 2/3")
    make_parts(spec, 3, [2])
    make_parts(spec, 2, [1])
    fails(tsenor("merge", spec.output), 3, "parts of 2 and of 3")
    shutil.rmtree(tmp_path / "out.part-1-of-2")
    shutil.rmtree(tmp_path / "out.part-2-of-3")
    prune(PruneSpec(spec.model, spec.output, NMPattern(1, 4), part=Part(2, 3)))
    fails(tsenor("merge", spec.output), 3, "not of one run", "[parts-differ]")
    shutil.rmtree(tmp_path / "out.part-2-of-3")
    make_parts(spec, 3, [2])
    (shard, *_) = (tmp_path / "out.part-2-of-3").glob("*.safetensors")
    shard.rename(tmp_path / "aside")
    fails(tsenor("merge", spec.output), 3, shard.name)
    (tmp_path / "aside").rename(shard)
    (masks, *_) = (tmp_path / "out.part-2-of-3" / "tsenor-masks").iterdir()
    masks.rename(tmp_path / "aside")
    fails(tsenor("merge", spec.output), 3, "tensors and masks that their reports name", "[parts-differ]")
    (tmp_path / "aside").rename(masks)
    spec.output.mkdir()
    fails(tsenor("merge", spec.output), 5, "exists")
    (spec.output / "notes.txt").write_text("mine")
    fails(tsenor("merge", spec.output, "--overwrite"), 5, "not made by tsenor")
    (spec.output / "notes.txt").unlink()
    done = tsenor("merge", spec.output, "--overwrite")
    assert (done.code, done.out) == (0, f"{spec.output}\n")
    assert tsenor("verify", spec.output, "--against", spec.model).code == 0


def test_an_unfinished_run_beside_the_parts_is_not_lost(tsenor, spec):
    class Stops(Observer):
        def pruned(self, _record):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(spec, Stops())
    make_parts(spec, 2)
    unfinished = spec.output.with_name("out.tsenor-partial")
    before = content(unfinished)
    fails(tsenor("merge", spec.output), 5, "unfinished", "--resume", "[unfinished-run]")
    assert content(unfinished) == before
    prune(replace(spec, resume=True))


def test_the_command(tsenor, llama):
    for number in (1, 2):
        done = tsenor("prune", llama, "--nm", "2:4", "--shard", f"{number}/2", "-q")
        assert (done.code, done.out) == (0, f"llama-2of4-transposable.part-{number}-of-2\n")
    done = tsenor("merge", "llama-2of4-transposable", "--json", "--fail-if", "coverage<0.9")
    assert done.code == 0
    assert json.loads(done.out)["processes"] == 2


@pytest.mark.parametrize("part", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2"])
def test_impossible_parts(tsenor, llama, part):
    fails(tsenor("prune", llama, "--nm", "2:4", f"--shard={part}"), 2, "not possible")


def test_layers_need_all_parts(tsenor, llama, tmp_path):
    (tmp_path / "text.txt").write_text("a b c")
    calibrated = ("--method", "wanda", "--calibration", tmp_path / "text.txt")
    fails(tsenor("prune", llama, "--nm", "2:4", "--shard", "1/2", *calibrated), 2, "torchrun")
