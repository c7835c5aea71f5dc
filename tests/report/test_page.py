"""The page holds what the JSON says, needs nothing else, and cannot be made to do anything by names in a report."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from report.examples import large_report, mixture_report

from tsenor_cli.report.charts import COLOURS
from tsenor_cli.report.compare import Run
from tsenor_cli.report.page import comparison_page, report_page

VOID = {"meta", "link", "br", "hr", "img", "input", "path", "use", "rect", "image"}


class Elements(HTMLParser):
    """Every element with its attributes; fails where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.text = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID or tag in {"path", "use"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def shown(text):
    return " ".join(" ".join(Elements(text).text).split())


@pytest.fixture(scope="module")
def page():
    return report_page(large_report(), price_per_hour=2.0)


def test_it_says_what_the_report_says(page):
    text = shown(page)
    for what in ("meta-llama/Llama-3.1-8B", "8:16 transposable, alps", "99.10 %", "6.24 → 7.02", "+12.50 %", "3.12 %"):
        assert what in text
    for what in ("1 h 29 min", "20 GiB", "2.9564", "44.7 GiB", "1 prunable", "ignored", "NVIDIA H100", "solving masks"):
        assert what in text
    assert "tsenor prune meta-llama/Llama-3.1-8B@" in text


def test_every_pruned_weight_is_in_the_table_and_in_the_charts(page):
    rows = re.findall(r'<th scope="row">layer (\d+), ([^<]*)</th>', page)
    assert len(rows) == len(set(rows)) == 223
    titles = re.findall(r"<title>layer (\d+), ([^:<]*): [^<]*</title>", page)
    assert len(titles) == 4 * 223
    assert set(titles) == set(rows)


def test_it_needs_nothing_but_itself(page):
    elements = Elements(page).found
    assert not {tag for tag, _ in elements} & {"script", "iframe", "object", "embed"}
    for _, attributes in elements:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), attributes
    assert "url(http" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_names_in_it_are_unique_and_charts_have_words(page):
    elements = Elements(page).found
    names = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(names) == len(set(names))
    charts = [attributes for tag, attributes in elements if tag == "svg"]
    assert len(charts) == 8
    assert all(chart["role"] == "img" and len(chart["aria-label"]) > 30 for chart in charts)
    assert any("kept per row 8, per column 8" in chart["aria-label"] for chart in charts)


def test_colours_follow_light_and_dark(page):
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    light, dark = re.search(r":root \{(.*?)\}.*?:root \{(.*?)\}", page, re.DOTALL).groups()
    assert used <= set(re.findall(r"(--[\w-]+):", light)) & set(re.findall(r"(--[\w-]+):", dark))
    assert {f"--series-{i}" for i in range(COLOURS)} <= set(re.findall(r"(--[\w-]+):", light))
    assert not re.search(r"(fill|stroke): #", page), "a chart has a colour that is no role"


def test_an_8b_model_takes_less_than_a_megabyte():
    for m in (4, 16, 32, 64):
        assert len(report_page(large_report(m)).encode()) < 1_000_000


def test_experts_of_a_layer_are_one_row():
    page = report_page(mixture_report())
    assert len(page.encode()) < 1_000_000
    assert "layer 3, mlp.experts.down_proj (512 tensors)" in page
    assert "* experts that saw too few tokens" in page


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "\" onload='x", "{{ 7*7 }}", "</svg><b>", "&lt;", "\u202ename"]
)
def test_names_stay_names(name):
    report = large_report()
    record = replace(report.tensors[1], name=f"model.layers.0.{name}.weight")
    report = replace(
        report,
        model={**report.model, "source": name},
        tensors=[record, *report.tensors[2:]],
        tile=replace(report.tile, tensor=name),
    )
    page = report_page(report)
    elements = Elements(page)
    assert not [tag for tag, attributes in elements.found if tag in {"script", "b"} or "onload" in attributes]
    assert name in "".join(elements.text)
    assert name in "".join(Elements(comparison_page([Run(name, report), Run("other", report)])).text)


def test_a_report_with_hardly_anything_has_a_page():
    report = large_report()
    nothing = replace(
        report, tensors=[], tile=None, histogram=None, perplexity=None, calibration=None, pattern=None, citations={}
    )
    nothing = replace(
        nothing, summary=replace(nothing.summary, error=None, stages={}, read_bytes=None, written_bytes=None)
    )
    assert "nothing was pruned" in shown(report_page(nothing))
    assert "No pruned tensor belongs to a layer." in shown(report_page(nothing))


@pytest.mark.parametrize("gap", [0.0, 1e-300, 0.9, 1.0])
def test_any_gap_can_be_drawn(gap):
    report = large_report()
    tensors = [replace(r, upper_bound=1.0, objective=1.0 - gap) if r.action == "pruned" else r for r in report.tensors]
    assert "Gap to the optimum" in report_page(replace(report, tensors=tensors))


def test_a_made_up_tile_is_left_out():
    report = large_report()
    for weights, kept in ((["1 2", "3 4"], ["10"]), (["1e999 2", "3 4"], ["10", "01"]), ([], [])):
        page = report_page(replace(report, tile=replace(report.tile, weights=weights, kept=kept)))
        Elements(page)


def test_a_comparison_shows_every_run():
    runs = [Run("a", large_report(), 1.0), Run("b", large_report(4))]
    page = comparison_page(runs)
    assert "2 runs side by side" in shown(page)
    assert page.count('<th scope="row">') == 2
    assert page.count("<title>layer 31, a: ") == page.count("<title>layer 31, b: ") == 4
    assert "1.4782" in page
