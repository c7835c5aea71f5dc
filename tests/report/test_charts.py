"""What a chart says where the obvious way of drawing it would mislead."""

from __future__ import annotations

import re

import pytest
from matplotlib.figure import Figure

from tsenor_cli.report import charts
from tsenor_cli.report.charts import by_layer
from tsenor_cli.report.records import Histogram
from tsenor_cli.report.words import tiny


@pytest.mark.parametrize(
    ("gaps", "marks"),
    [
        ((0.0, 0.0), ["0", "1e-17"]),  # 1e-18, drawn in its place, would be read as a figure
        ((0.0, 3e-17), ["0", "1e-17", "1e-16"]),
        ((2e-13, 3e-12), ["1e-13", "1e-12", "1e-11"]),
    ],
)
def test_a_gap_of_zero_stands_at_a_zero(gaps: tuple[float, float], marks: list[str]) -> None:
    svg = by_layer("Gaps", {"all": list(enumerate(gaps))}, label="gap", log=True)
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    assert texts[texts.index("layer") + 1 : texts.index("gap")] == marks


def test_zero_in_words() -> None:
    assert [tiny(0.0), tiny(3.14e-13)] == ["0", "3.1e-13"]


def test_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Margins are given by hand: labels of any length must find room in them."""
    drawn: list[Figure] = []
    monkeypatch.setattr(charts, "_svg", lambda figure, *_: drawn.append(figure) or "")
    for count in (1, 1000, 123_456_789, 30_000_000_000):
        charts.histogram(Histogram(tensors=1, edge=4.0, weights=count, before=[0, count, 0], after=[0, count // 2, 0]))
    for values in ((0.0, 5e-18), (1e-13, 1.0), (1.25e-5, 1.5e-5), (0.00012, 0.00013), (85.25, 85.5), (950.0, 1200.0)):
        series = {"mlp.down_proj": list(enumerate(values))}
        charts.by_layer("", series, label="squared error, of outputs", percent=True)
        charts.by_layer("", series, label="share of the optimum", log=True)
    charts.loss_curve([1234.5, 1234.1])
    for figure in drawn:
        width, height = figure.get_size_inches()
        box = figure.get_tightbbox()
        cut = min(box.x0, box.y0, width - box.x1, height - box.y1)
        assert cut >= 0, (figure.axes[0].get_ylabel(), box.extents)
