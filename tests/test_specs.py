"""Patterns: N is the number kept, and nothing impossible gets further than the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tsenor_cli.errors import UsageError
from tsenor_cli.specs import CalibrationSpec, FinetuneSpec, NMPattern, PruneSpec


@pytest.mark.parametrize("text", ["1:2", "2:4", "1:64", "63:64", "16:32"])
def test_possible_patterns(text):
    pattern = NMPattern.parse(text)
    assert str(pattern) == text
    assert pattern.transposable
    assert pattern.kind == "transposable"


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4", "2:65", "x", "", "2:4 ", "２:４", "1e1:20", "9999:99999"])
def test_impossible_patterns(text):
    with pytest.raises(UsageError):
        NMPattern.parse(text)


def test_transposable_needs_both_axes():
    assert NMPattern(2, 4).divides(8, 12)
    assert not NMPattern(2, 4).divides(6, 12)
    assert NMPattern(2, 4, transposable=False).divides(6, 12)
    assert not NMPattern(2, 4, transposable=False).divides(12, 6)


def test_paths_are_what_the_run_needs():
    path, text = Path("a") / "b", str(Path("a") / "b")
    pruned = PruneSpec(path, "out", NMPattern(2, 4), calibration=CalibrationSpec(path), eval_text=path)
    assert (pruned.model, pruned.output, pruned.eval_text) == (text, Path("out"), text)
    assert pruned.calibration.source == text
    tuned = FinetuneSpec(path, "out", path, eval_text=path)
    assert (tuned.model, tuned.output, tuned.text, tuned.eval_text) == (text, Path("out"), text, text)
    assert FinetuneSpec("a", Path("out"), "b").eval_text is None
