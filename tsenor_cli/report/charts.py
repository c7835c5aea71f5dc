"""Pictures of a report as SVG, to stand in a page: drawn by matplotlib, coloured by the page.

Colours are drawn as names of roles and replaced by variables of the page's style, so that they follow light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullFormatter

from tsenor_cli.report.records import Histogram, Tile

COLOURS = 10  # that the page's style gives to series
NO_GAP = 1e-18  # drawn in place of zero, which has no place on a logarithmic axis
_INK, _MUTED, _GRID = "#b00000", "#b00001", "#b00002"
_ROLES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--line)"}
_MARKERS = "os^Dv<>pP*"
_KEEPS_COUNTS = 32  # the largest corner whose rows and columns have room for numbers
_POSITIVE, _NEGATIVE = (0.74, 0.30, 0.0), (0.12, 0.44, 0.92)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.family": ["DejaVu Sans"],  # comes with matplotlib; the page's style overrules it
    "font.size": 9,
    "axes.formatter.useoffset": False,  # marks say what they are, without a sum in a corner
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
}
Points = Sequence[tuple[int, float]]


def by_layer(name: str, series: Mapping[str, Points], *, label: str, log: bool = False, percent: bool = False) -> str:
    """Lines over the layers, one for each of `series`; every point says its value when it is pointed at.

    Args:
        name: what the picture shows, for those who cannot see it.
        series: (layer, value) of every point, by the name of the line.
        label: of the vertical axis.
        log: the axis is logarithmic.
        percent: values are.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(margins=(0.25, 0.17, 0.97, 0.96))
        shown = _percent if percent else _number
        for index, points in enumerate(series.values()):
            layers = [layer for layer, _ in points]
            values = [max(value, NO_GAP) if log else value for _, value in points]
            marker, colour = _MARKERS[index % len(_MARKERS)], _series_colour(index)
            axes.plot(layers, values, color=colour, linewidth=1, alpha=0.6)
            axes.plot(layers, values, marker, color=colour, markersize=4, gid=f"series-{index}")
        if log:
            _whole_decades(axes)
        axes.set(xlabel="layer", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g} %"))
        axes.grid(axis="y")
        axes.margins(x=0.03)
        titles = [
            [f"layer {layer}, {kind}: {shown(value)}" for layer, value in points] for kind, points in series.items()
        ]
        return _svg(figure, f"{name}. {_extremes(titles, series)}", titles)


def _whole_decades(axes: Axes) -> None:
    """A logarithmic axis from one power of ten to another, so that it has at least two marks; zero is at its foot."""
    low, high = axes.dataLim.intervaly
    foot = NO_GAP / 2 if low <= NO_GAP else 10.0 ** np.floor(np.log10(low) - 0.01)
    axes.set(yscale="log", ylim=(foot, 10.0 ** np.ceil(np.log10(high) + 0.01)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}" if value > NO_GAP * 1.01 else "0"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def loss_curve(losses: Sequence[float]) -> str:
    """The loss of every step of training, in nats per token."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(margins=(0.17, 0.17, 0.97, 0.96))
        axes.plot(range(1, len(losses) + 1), losses, color=_series_colour(0), linewidth=1)
        axes.set(xlabel="step", ylabel="loss, nats per token")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        return _svg(figure, f"Loss of {len(losses):,} steps, from {losses[0]:.3f} to {losses[-1]:.3f}.")


def histogram(found: Histogram) -> str:
    """Steps of the weights before and after, in standard deviations."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(margins=(0.17, 0.17, 0.97, 0.88))
        edges = np.linspace(-found.edge, found.edge, len(found.before) + 1)
        axes.stairs(found.before, edges, color=_series_colour(0), fill=True, alpha=0.35, label="before")
        axes.stairs(found.after, edges, color=_series_colour(1), linewidth=1.5, label="after, without the zeros")
        axes.set(xlabel="weight, in standard deviations of its tensor", ylabel="weights")
        axes.yaxis.set_major_formatter(EngFormatter())  # 100 M: billions of weights have no room in full
        axes.grid(axis="y")
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
        kept = sum(found.after) / max(sum(found.before), 1)
        return _svg(figure, f"Histogram of {found.weights:,} weights before and after, {kept:.1%} of them kept.")


def tile_panels(tile: Tile) -> list[tuple[str, str]]:
    """(caption, SVG) of the corner as it was, of what is kept of it, and of the transpose, rows and columns counted."""
    weights = np.nan_to_num(np.array([[float(number) for number in row.split()] for row in tile.weights]))
    kept = np.array([[char == "1" for char in row] for row in tile.kept])
    if weights.ndim != 2 or weights.shape != kept.shape:
        return []
    step = int(tile.pattern.partition(":")[2])
    scale = float(np.abs(weights).max()) or 1.0
    pictures = [("the weights", weights, None), ("what is kept", weights, kept), ("its transpose", weights.T, kept.T)]
    return [(caption, _heat_map(caption, values / scale, mask, step)) for caption, values, mask in pictures]


def _heat_map(caption: str, values: np.ndarray, kept: np.ndarray | None, step: int) -> str:
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(width=3.1, height=3.1, margins=(0.02, 0.12, 0.88, 0.98))
        colours = np.where(values[..., None] > 0, np.array(_POSITIVE), np.array(_NEGATIVE))
        strength = np.where(values == 0, 0.0, 0.2 + 0.8 * np.abs(values))
        if kept is not None:
            strength = np.where(kept, np.maximum(strength, 0.2), 0.0)
        axes.imshow(np.dstack([colours, strength]), interpolation="nearest", aspect="equal")
        rows, columns = values.shape
        for length, line in ((columns, axes.axvline), (rows, axes.axhline)):
            for place in range(0, length + 1, step):
                line(place - 0.5, color=_MUTED, linewidth=0.8)
        axes.set(xticks=[], yticks=[], xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
        axes.spines[:].set_visible(False)
        said = f"Heat map, {caption}: {rows} rows and {columns} columns"
        if kept is not None:
            _write_counts(axes, kept, step)
            said += f"; kept per row {_range(kept.sum(axis=1))}, per column {_range(kept.sum(axis=0))}"
        return _svg(figure, said + ".")


def _write_counts(axes: Axes, kept: np.ndarray, step: int) -> None:
    """How many are kept of each row, to the right, and of each column, below."""
    rows, columns = kept.shape
    if max(rows, columns) > _KEEPS_COUNTS:
        return
    size = max(4.5, 9 - max(rows, columns) / 7)
    for row, line in enumerate(kept):
        axes.text(columns - 0.3, row, _sums(line, step), ha="left", va="center", fontsize=size, clip_on=False)
    for column, line in enumerate(kept.T):
        axes.text(
            column, rows - 0.3, _sums(line, step), ha="center", va="top", fontsize=size, rotation=90 * (rows > step)
        )


def _sums(line: np.ndarray, step: int) -> str:
    """What is kept of each group of a line: 2+2."""
    return "+".join(str(int(line[a:b].sum())) for a, b in pairwise([*range(0, len(line), step), len(line)]))


def _figure(
    width: float = 4.4, height: float = 2.7, margins: tuple[float, float, float, float] = (0.17, 0.17, 0.97, 0.96)
) -> tuple[Figure, Axes]:
    """Of inches, of which a page makes 96 pixels or what fits; left, bottom, right and top of the axes as shares.

    Margins are given, because to find the best ones takes as long as all the drawing.
    """
    figure = Figure(figsize=(width, height))
    figure.patch.set_alpha(0)
    figure.subplots_adjust(*margins)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, alt: str, titles: Sequence[Sequence[str]] = ()) -> str:
    """The figure as an element of a page: no names that could clash with another's, roles for colours, `alt`."""
    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": alt}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for index, names in enumerate(titles):
        text = _with_titles(text, f"series-{index}", names) if names else text
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"#a0000(\d)", r"var(--series-\1)", text)
    for drawn, role in _ROLES.items():
        text = text.replace(drawn, role)
    text = re.sub(r"\s*\n\s*", "\n", text)
    return text.replace("<svg ", f'<svg class="chart" role="img" aria-label="{escape(alt)}" ', 1)


def _with_titles(text: str, gid: str, titles: Sequence[str]) -> str:
    """Give the points of one group their titles, which browsers show when a point is pointed at."""
    start = text.index(f'<g id="{gid}"')
    stop = text.index("</g>\n", text.index("<use", start))
    named = iter(titles)
    points = re.sub(
        r"<use ([^>]*)/>", lambda use: f"<use {use[1]}><title>{escape(next(named))}</title></use>", text[start:stop]
    )
    return text[:start] + points + text[stop:]


def _series_colour(index: int) -> str:
    return f"#a0000{index % COLOURS}"


def _extremes(titles: Sequence[Sequence[str]], series: Mapping[str, Points]) -> str:
    """The smallest and the largest value in words."""
    values = [(value, i, j) for i, points in enumerate(series.values()) for j, (_, value) in enumerate(points)]
    if not values:
        return "No values."
    (_, i, j), (_, k, m) = min(values), max(values)
    return f"Smallest: {titles[i][j]}. Largest: {titles[k][m]}."


def _range(counts: np.ndarray) -> str:
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"


def _percent(value: float) -> str:
    return f"{value:.2f} %"


def _number(value: float) -> str:
    return f"{value:.3g}"
