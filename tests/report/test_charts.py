"""What a chart says where the obvious way of drawing it would mislead."""

from __future__ import annotations

import re

import pytest

from tsenor_cli.report.charts import by_layer
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
