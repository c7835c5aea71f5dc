"""tsenor-report.html: the report as a page that needs nothing but itself, made from the JSON alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache

import jinja2

from tsenor_cli.report import charts
from tsenor_cli.report.command import RECIPE_FILE, recipe, shell_command
from tsenor_cli.report.compare import Run, columns_of, remarks
from tsenor_cli.report.groups import Group, group_pruned
from tsenor_cli.report.records import Report, TensorRecord
from tsenor_cli.report.words import amount, duration, percent, size, tiny

_SHOWN_NAMES = 20  # of tensors that were skipped for one reason
_STAGES = {
    "planning": "planning, reading text",
    "perplexity": "measuring perplexity",
    "resuming": "checking what an interrupted run left",
    "layers": "running layers, reading, writing",
    "masks": "solving masks",
    "weights": "scores and updates",
    "training": "fine-tuning",
    "finishing": "finishing",
}


def report_page(report: Report, price_per_hour: float | None = None) -> str:
    """The page of one run; with the price of an hour of the machine, in any currency, it says what the run has cost."""
    groups = group_pruned(report.tensors)
    kinds = list(dict.fromkeys(group.kind for group in groups if group.layer is not None))
    return _template("report.html").render(
        report=report,
        summary=report.summary,
        run=Run("", report, price_per_hour),
        price_per_hour=price_per_hour,
        what=what_was_done(report),
        groups=groups,
        kinds=kinds,
        plots=_plots({kind: [group for group in groups if group.kind == kind] for kind in kinds}),
        stages={_STAGES.get(name, name): seconds for name, seconds in report.summary.stages.items()},
        panels=charts.tile_panels(report.tile) if report.tile is not None else [],
        losses=charts.loss_curve(report.training["losses"]) if report.training is not None else None,
        histogram=charts.histogram(report.histogram) if report.histogram is not None else None,
        skipped=_by_reason(record for record in report.tensors if record.prunable and record.action == "kept"),
        others=_by_reason(record for record in report.tensors if not record.prunable),
        command=shell_command(report),
        recipe=recipe(report),
        recipe_file=RECIPE_FILE,
    )


def comparison_page(runs: Sequence[Run]) -> str:
    """The page that shows runs side by side."""
    return _template("comparison.html").render(
        runs=runs,
        columns=columns_of(runs),
        remarks=remarks(runs),
        kinds=[run.name for run in runs],
        plots=_plots({run.name: _whole_layers(group_pruned(run.report.tensors)) for run in runs}),
    )


def what_was_done(report: Report) -> str:
    """In a sentence."""
    patterns = dict.fromkeys(
        f"{record.pattern} {'transposable' if record.transposable else 'standard'}, {record.method}"
        for record in report.tensors
        if record.action == "pruned"
    )
    return ("; ".join(patterns) or "nothing was pruned") + (", fine-tuned" if report.training is not None else "")


def _plots(lines: Mapping[str, Sequence[Group]]) -> list[tuple[str, str]]:
    """(caption, SVG) of what there is to show by layer: a line for every name."""

    def series(value: Callable[[Group], float | None]) -> dict[str, list[tuple[int, float]]]:
        found = {name: [(group.layer, value(group)) for group in groups] for name, groups in lines.items()}
        return {
            name: [(layer, here) for layer, here in points if layer is not None and here is not None]
            for name, points in found.items()
        }

    plots = [
        ("Energy", series(lambda group: 100 * group.kept_energy), {"label": "Σ w², after / before", "percent": True}),
        ("Output error", series(_error), {"label": "squared error, of outputs", "percent": True}),
        ("Gap to the optimum", series(lambda group: group.gap), {"label": "", "log": True}),
        ("Time", series(lambda group: group.seconds), {"label": "seconds"}),
    ]
    return [
        (caption, charts.by_layer(f"{caption} by layer", points, **how))  # type: ignore[arg-type]
        for caption, points, how in plots
        if any(points.values())
    ]


def _whole_layers(groups: Sequence[Group]) -> list[Group]:
    found: dict[int, list[TensorRecord]] = {}
    for group in groups:
        if group.layer is not None:
            found.setdefault(group.layer, []).extend(group.records)
    return [Group(layer, "all weights", tuple(records)) for layer, records in found.items()]


def _error(group: Group) -> float | None:
    return None if group.error is None else 100 * group.error


def _by_reason(records: Iterable[TensorRecord]) -> list[tuple[str, list[TensorRecord], int]]:
    """(reason, tensors, how many of them need not be named), the largest first."""
    found: dict[str, list[TensorRecord]] = {}
    for record in records:
        found.setdefault(record.reason or "", []).append(record)
    by_size = sorted(found.items(), key=lambda entry: -sum(record.parameters for record in entry[1]))
    return [(reason, members, max(len(members) - _SHOWN_NAMES, 0)) for reason, members in by_size]


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tsenor_cli.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"amount": amount, "duration": duration, "percent": percent, "size": size, "tiny": tiny}
    environment.globals["COLOURS"] = charts.COLOURS
    environment.globals["SHOWN_NAMES"] = _SHOWN_NAMES
    return environment


def _template(name: str) -> jinja2.Template:
    return _environment().get_template(name)
