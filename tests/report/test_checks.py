"""Conditions on the numbers of a report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from report.examples import large_report

from tsenor_cli.errors import CheckFailed, UsageError
from tsenor_cli.report.checks import METRICS, Condition, fail_if

REPORT = large_report()


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("perplexity_ratio>1.05", True),
        ("perplexity_ratio>1.2", False),
        (" coverage < 0.9 ", False),
        ("coverage<=0.991", True),
        ("coverage>=0.991", True),
        ("coverage<0.991", False),
        ("gap>1e-12", False),
        ("gap>1e-13", True),
        ("skipped_tensors>0", True),
        ("perplexity>7", True),
        ("perplexity_before>7", False),
    ],
)
def test_conditions(text, holds):
    condition = Condition.parse(text)
    assert condition.holds(REPORT, "a run") is holds
    if holds:
        with pytest.raises(CheckFailed, match=condition.metric) as failure:
            fail_if([condition], REPORT, "out")
        assert failure.value.code == "fail-if"
    else:
        fail_if([condition], REPORT, "out")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "coverage",
        "coverage<",
        "coverage=0.9",
        "coverage<x",
        "<0.9",
        "cover<1",
        "coverage<1<2",
        "coverage<1.2.3",
        "gap>-1",
    ],
)
def test_what_is_no_condition(text):
    with pytest.raises(UsageError, match="not a condition") as failure:
        Condition.parse(text)
    assert failure.value.code == "bad-condition"


@pytest.mark.parametrize("text", ["perplexity_ratio>1", "error>0.5"])
def test_a_number_that_is_not_there_fails_the_check(text):
    bare = replace(REPORT, perplexity=None, summary=replace(REPORT.summary, error=None))
    with pytest.raises(CheckFailed, match="has no"):
        fail_if([Condition.parse(text)], bare, "out")


def test_the_page_on_ci_names_them_all():
    page = (Path(__file__).parents[2] / "docs" / "ci.md").read_text()
    assert [name for name in METRICS if f"`{name}`" not in page] == []


def test_all_numbers_are_numbers():
    for name, value in METRICS.items():
        assert isinstance(value(REPORT), int | float), name
