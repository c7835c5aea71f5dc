"""Streaming changes nothing: bands of any size give the bytes of the whole tensor."""

from __future__ import annotations

import pytest
from checkpoints import make_checkpoint, read_shards

from tsenor_cli.observer import Observer
from tsenor_cli.pipeline import prune, verify
from tsenor_cli.specs import NMPattern, PruneSpec


class Counter(Observer):
    """Adds up what it is told."""

    def __init__(self) -> None:
        self.planned_bytes = self.done_bytes = 0

    def planned(self, plan) -> None:
        self.planned_bytes = sum(item.tensor.nbytes for item in plan.tensors)

    def advanced(self, name, nbytes) -> None:
        assert name
        self.done_bytes += nbytes


class Verifying(Counter):
    def began(self, nbytes) -> None:
        self.planned_bytes = nbytes


@pytest.mark.parametrize("compared", [True, False])
def test_verifying_says_how_far_it_is(llama, tmp_path, compared):
    prune(PruneSpec(str(llama), tmp_path / "out", NMPattern(2, 4)))
    counter = Verifying()
    assert verify(str(tmp_path / "out"), None, str(llama) if compared else None, counter).ok
    assert counter.planned_bytes == counter.done_bytes > 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_oss", "qwen3_vl_moe", "resnet"])
@pytest.mark.parametrize("transposable", [True, False])
def test_bands_do_not_matter(architecture, transposable, tmp_path, monkeypatch):
    source = make_checkpoint(architecture, tmp_path / "source")
    pattern = NMPattern(2, 4, transposable=transposable)
    whole = prune(PruneSpec(str(source), tmp_path / "whole", pattern))
    monkeypatch.setattr("tsenor_cli.checkpoint.plan.BAND_BYTES", 1)  # one row of tiles, or one expert, at a time
    bands = prune(PruneSpec(str(source), tmp_path / "bands", pattern))
    for file in read_shards(source):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "bands" / file).read_bytes()
    assert [(r.name, r.zeros, r.action) for r in whole.tensors] == [(r.name, r.zeros, r.action) for r in bands.tensors]
    assert whole.summary.objective == pytest.approx(bands.summary.objective, rel=1e-12)


def test_progress_adds_up_to_the_plan(llama, tmp_path):
    counter = Counter()
    prune(PruneSpec(str(llama), tmp_path / "out", NMPattern(2, 4)), counter)
    assert counter.done_bytes == counter.planned_bytes > 0
