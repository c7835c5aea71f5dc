"""Patterns: N is the number kept, and nothing impossible gets further than the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tsenor_cli.errors import UsageError
from tsenor_cli.specs import NMPattern, PruneSpec


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
    spec = PruneSpec(Path("a") / "b", "out", NMPattern(2, 4))
    assert (spec.model, spec.output) == (str(Path("a") / "b"), Path("out"))
