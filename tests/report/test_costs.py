"""What a run is said to cost adds up, and is none the worse where the system does not tell."""

from __future__ import annotations

import json
import time

import pytest

from tsenor_cli.pipeline import prune
from tsenor_cli.report import costs
from tsenor_cli.report.costs import Costs
from tsenor_cli.specs import NMPattern, PruneSpec


def test_stages_add_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    spent = Costs()
    now[0] = 2.0
    spent.spent("a")
    now[0] = 7.0
    spent.spent("b", c=1.5, d=0.5)
    now[0] = 8.0
    spent.spent("a", c=3.0)  # on a GPU, several things at once
    assert spent.stages == {"a": 2.0, "b": 3.0, "c": 4.5, "d": 0.5}
    assert spent.seconds == 8.0


def test_of_a_real_run(llama, tmp_path):
    prune(PruneSpec(str(llama), tmp_path / "out", NMPattern(2, 4)))
    summary = json.loads((tmp_path / "out" / "tsenor-report.json").read_text())["summary"]
    assert set(summary["stages"]) == {"planning", "layers", "masks", "weights", "finishing"}
    assert sum(summary["stages"].values()) <= summary["seconds"] + 0.01
    assert summary["read_bytes"] >= summary["checkpoint_bytes"]
    assert summary["written_bytes"] >= summary["checkpoint_bytes"]


def test_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(costs, "_PROC", tmp_path / "nowhere")
    assert Costs().moved_bytes == (None, None)
    assert costs.memory_bytes() is None
    assert costs.peak_memory_bytes() > 2**20


@pytest.mark.parametrize("platform", ["win32"])
def test_windows(monkeypatch, tmp_path, platform):
    monkeypatch.setattr(costs, "_PROC", tmp_path / "nowhere")
    monkeypatch.setattr("sys.platform", platform)
    assert costs.peak_memory_bytes() == 0
