"""Speed against gap, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tsenor_cli.bench import OURS
from tsenor_cli.bench.measure import Comparison
from tsenor_cli.errors import TsenorError, UsageError

NOTHING = 1e-8  # gaps below this are drawn here: zero has no place on a logarithmic axis


def save_plot(comparisons: Sequence[Comparison], path: Path) -> None:
    """Draw every contender with a gap at (ns per score, gap), one colour per problem and pattern.

    The suffix of `path` says the format: .png, .svg, .pdf.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for colour, comparison in enumerate(comparisons):
        shown = [one for one in comparison.measurements if one.gap is not None]
        label = f"{comparison.pattern}, {comparison.problem['name']}"
        axes.scatter(
            [one.ns_per_score for one in shown],
            [max(one.gap or 0.0, NOTHING) for one in shown],
            s=[90 if one.solver in OURS else 35 for one in shown],
            color=f"C{colour % 10}",
            label=label,
            alpha=0.8,
        )
        for one in shown:
            place = one.ns_per_score, max(one.gap or 0.0, NOTHING)
            axes.annotate(f" {one.solver}", place, fontsize=7, rotation=30, color=f"C{colour % 10}")
    axes.set(xscale="log", yscale="log", xlabel="nanoseconds per score", ylabel="gap to the optimum")
    axes.set_title("Transposable masks: faster to the left, better downwards", loc="left")
    axes.axhspan(NOTHING / 3, NOTHING * 3, color="0.92", zorder=0)
    axes.text(0.99, NOTHING, "optimal", transform=axes.get_yaxis_transform(), ha="right", va="top", color="0.5")
    axes.legend(fontsize=8)
    axes.grid(visible=True, which="major", color="0.9")
    axes.set_axisbelow(True)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise UsageError(f"{path}: {error}", "give a name that ends in .png, .svg or .pdf") from error
    except OSError as error:
        raise TsenorError(f"{path}: {error.strerror}") from error
