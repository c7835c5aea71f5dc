"""`tsenor report`: pages, tables, conditions; and reports that are none."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import threading

import pytest
from report.examples import large_report

from tsenor_cli.pipeline import prune
from tsenor_cli.report.page import report_page
from tsenor_cli.report.read import read_report
from tsenor_cli.specs import NMPattern, PruneSpec


@pytest.fixture(scope="module")
def pristine_runs(pristine_llama, tmp_path_factory):
    """Two real runs with their pages, and the report of a large one that is made up."""
    work = tmp_path_factory.mktemp("runs")
    prune(PruneSpec(str(pristine_llama), work / "a", NMPattern(2, 4)))
    prune(PruneSpec(str(pristine_llama), work / "b", NMPattern(8, 16, transposable=False)))
    (work / "c").mkdir()
    (work / "c" / "tsenor-report.json").write_text(large_report().to_json())
    return work


@pytest.fixture
def runs(pristine_runs, tmp_path, real_page):  # noqa: ARG001  (asked for, not used)
    """The same in the current directory, where a test may damage them."""
    return shutil.copytree(pristine_runs, tmp_path / "work", dirs_exist_ok=True)


def test_a_run_writes_the_page_that_its_report_gives(tsenor, runs):
    page = runs / "a" / "tsenor-report.html"
    before = page.read_text()
    assert before == report_page(read_report(runs / "a"))
    page.unlink()
    outcome = tsenor("report", "a")
    assert (outcome.code, outcome.out, outcome.err) == (0, "a/tsenor-report.html\n", "")
    assert page.read_text() == before
    assert tsenor("verify", "a").code == 0
    assert sorted(path.name for path in runs.iterdir()) == ["a", "b", "c"]
    assert not list((runs / "a").glob(".*"))


def test_the_price(tsenor, runs):
    assert tsenor("report", "c", "--price-per-hour", "2", "-o", "page.html").out == "page.html\n"
    assert "2.9564" in (runs / "page.html").read_text()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_what_is_no_file_stays_what_it_is(tsenor, runs):
    pipe, link, received = runs / "pipe", runs / "link", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    assert tsenor("report", "a", "b", "--format", "csv", "-o", "pipe").code == 0
    reader.join(60)
    assert pipe.is_fifo()
    assert received[0].startswith("run,")
    (runs / "target.csv").touch()
    link.symlink_to("target.csv")
    assert tsenor("report", "a", "b", "--format", "csv", "-o", "link").code == 0
    assert link.is_symlink()
    assert (runs / "target.csv").read_text() == received[0]


@pytest.mark.parametrize(
    ("output", "why"), [(".", "is a directory"), ("", "is a directory"), ("x/y", "in no directory")]
)
def test_an_output_that_cannot_be_one(tsenor, runs, output, why):  # noqa: ARG001  (the current directory)
    outcome = tsenor("report", "a", "-o", output)
    assert outcome.code == 2
    assert why in outcome.err
    assert "[usage]" in outcome.err


def test_runs_side_by_side(tsenor, runs):
    table = tsenor("report", "a", "b", "c")
    assert table.code == 0
    assert "2:4 transposable" in table.out
    assert "8:16 standard" in table.out
    assert "The runs pruned different models." in table.out
    markdown = tsenor("report", "a", "b", "--format", "markdown").out
    assert markdown.startswith("|  | method | pattern |")
    lines = list(csv.DictReader(io.StringIO(tsenor("report", "a", "b", "c", "--format", "csv").out)))
    assert [line["run"] for line in lines] == ["a", "b", "c"]
    assert (
        float(lines[0]["kept_energy"])
        == json.loads((runs / "a/tsenor-report.json").read_text())["summary"]["kept_energy"]
    )
    data = json.loads(tsenor("report", "a", "b", "--json").out)
    assert [run["run"] for run in data["runs"]] == ["a", "b"]
    assert tsenor("report", "a", "b", "--format", "html").out == "tsenor-comparison.html\n"
    assert "2 runs side by side" in (runs / "tsenor-comparison.html").read_text()
    assert tsenor("report", "a", "b", "--format", "csv", "-o", "x.csv").out == "x.csv\n"
    assert (runs / "x.csv").read_text().startswith("run,")


def test_runs_of_one_name_are_told_apart(tsenor, runs):
    (runs / "old").mkdir()
    (runs / "a").rename(runs / "old" / "b")
    assert "old/b" in tsenor("report", "b", "old/b").out


@pytest.mark.usefixtures("runs")
def test_conditions(tsenor):
    assert tsenor("report", "a", "b", "--json", "--fail-if", "coverage<0.5").code == 0
    outcome = tsenor("report", "a", "c", "--json", "--fail-if", "perplexity_ratio>1.05")
    assert outcome.code == 4
    assert json.loads(outcome.out)
    assert outcome.err.startswith("tsenor: error: a: the report has no perplexity_ratio")
    outcome = tsenor("report", "c", "--json", "--fail-if", "perplexity_ratio>1.05")
    assert outcome.code == 4
    assert outcome.err == "tsenor: error: c: perplexity_ratio is 1.125, failing on perplexity_ratio>1.05 [fail-if]\n"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda facts: facts.pop("summary"), "summary"),
        (lambda facts: facts["summary"].update(coverage="high"), "coverage"),
        (lambda facts: facts["summary"].update(coverage=float("inf")), "coverage"),
        (lambda facts: facts["summary"].update(seconds=10**400), "seconds"),
        (lambda facts: facts["tensors"][3].update(shape="x"), "shape"),
        (lambda facts: facts["tensors"][3].update(energy=-1), "energy"),
        (lambda facts: facts.update(tensors={}), "tensors"),
        (lambda facts: facts.update(more=1), "more"),
        (lambda facts: facts["tile"].update(weights=["1 2 x"]), "tile"),
        (lambda facts: facts["histogram"].update(before=[-1]), "histogram"),
        (lambda facts: facts.update(schema_version=3), "schema version 3"),
        (lambda facts: facts.update(schema_version=True), "schema version True"),
        (lambda facts: facts.update(schema_version="x" * 10**6), "schema version"),
    ],
)
def test_a_report_that_was_tampered_with_is_refused_in_a_line(tsenor, runs, change, word):
    path = runs / "c" / "tsenor-report.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))
    outcome = tsenor("report", "c")
    assert (outcome.code, outcome.out) == (3, "")
    assert word in outcome.err
    assert outcome.err.count("\n") == 1
    assert len(outcome.err) < 500


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"schema_version": 6}', "\xff", '{"a": NaN}'])
def test_what_is_no_report(tsenor, runs, text):
    (runs / "c" / "tsenor-report.json").write_text(text, encoding="latin-1")
    outcome = tsenor("report", "c")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (3, "", 1)


@pytest.mark.usefixtures("runs")
def test_no_report_and_two_formats(tsenor, llama):
    outcome = tsenor("report", llama)
    assert outcome.code == 3
    assert "[no-report]" in outcome.err
    assert tsenor("report", "a", "--json", "--format", "csv").code == 2
    assert tsenor("report").code == 2
    assert tsenor("report", "a", "--fail-if", "beauty<1").code == 2


def test_a_page_that_cannot_be_written_leaves_the_old_one(tsenor, runs, monkeypatch):
    page = runs / "a" / "tsenor-report.html"
    before = page.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device", "x")))
    outcome = tsenor("report", "a")
    assert (outcome.code, outcome.out) == (1, "")
    assert "[disk-full]" in outcome.err
    assert page.read_text() == before
    assert not list((runs / "a").glob(".*"))
