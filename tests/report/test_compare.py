"""Runs side by side: the same figures in every format, and words where they cannot be compared."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

from report.examples import large_report

from tsenor_cli.report.checks import METRICS
from tsenor_cli.report.compare import Run, as_csv, as_data, as_markdown, as_rows, remarks

REPORT = large_report()
BARE = replace(REPORT, perplexity=None, summary=replace(REPORT.summary, error=None))


def test_rows_say_what_the_reports_say_and_leave_out_what_none_has():
    titles, rows = as_rows([Run("a", REPORT, 2.0), Run("b", BARE)])
    first = dict(zip(titles, rows[0], strict=True))
    assert first == {
        "": "a",
        "method": "alps",
        "pattern": "8:16 transposable",
        "coverage": "99.10 %",
        "energy": "87.30 %",
        "output error": "3.12 %",
        "perplexity before": "6.24",
        "perplexity": "7.02",
        "ratio": "1.1250",
        "gap": "3.0e-13",
        "time": "1 h 29 min",
        "peak memory": "20 GiB",
        "cost": "2.9564",
        "device": "cuda:0, NVIDIA H100",
    }
    assert dict(zip(titles, rows[1], strict=True))["perplexity"] == "–"
    titles, _ = as_rows([Run("b", BARE)])
    assert not {"perplexity", "output error", "cost"} & set(titles)


def test_csv_has_all_numbers_as_they_are():
    lines = list(csv.DictReader(io.StringIO(as_csv([Run("a,b", REPORT), Run("b", BARE)]))))
    assert [line["run"] for line in lines] == ["a,b", "b"]
    for name, value in METRICS.items():
        assert float(lines[0][name]) == value(REPORT)
    assert lines[1]["perplexity"] == lines[1]["cost"] == ""


def test_markdown_cannot_be_broken_by_names():
    text = as_markdown([Run("a|b\n<b>*x*", REPORT), Run("b", REPORT)])
    lines = text.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith(r"| a\|b \<b\>\*x\* | alps |")
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1


def test_data_are_the_metrics():
    (run,) = as_data([Run("a", REPORT)])["runs"]
    assert {name: run[name] for name in METRICS} == {name: value(REPORT) for name, value in METRICS.items()}


def test_what_cannot_be_compared_is_said():
    same = [Run("a", REPORT), Run("b", REPORT)]
    assert remarks(same) == []
    other = replace(
        REPORT, perplexity={key: {**REPORT.perplexity[key], "tokens_sha256": "00" * 32} for key in ("before", "after")}
    )
    assert "different tokens" in " ".join(remarks([*same, Run("c", other)]))
    assert "different models" in " ".join(
        remarks([*same, Run("c", replace(REPORT, model={**REPORT.model, "source": "x"}))])
    )
    assert "different devices" in " ".join(remarks([*same, Run("c", replace(REPORT, threads=1))]))
    trained = replace(REPORT, training={"losses": []})
    assert "Some runs are fine-tuned" in " ".join(remarks([*same, Run("c", trained)]))
    assert remarks([Run("a", trained), Run("b", trained)]) == []
    assert "different tokens" in as_markdown([*same, Run("c", other)])
