"""Runs side by side: as a table, as Markdown for a pull request, as CSV for a spreadsheet, as data."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tsenor_cli.report.checks import METRICS
from tsenor_cli.report.records import Report
from tsenor_cli.report.words import duration, percent, size, tiny


@dataclass(frozen=True)
class Run:
    """A report with a name to tell it from others."""

    name: str
    report: Report
    price_per_hour: float | None = None  # of the machine, in any currency

    @property
    def cost(self) -> float | None:
        return None if self.price_per_hour is None else self.price_per_hour * self.report.summary.seconds / 3600

    @property
    def metrics(self) -> dict[str, float | None]:
        return {name: value(self.report) for name, value in METRICS.items()}


@dataclass(frozen=True)
class Column:
    """What is compared; None where a run does not have it."""

    title: str
    value: Callable[[Run], Any]
    show: Callable[[Any], str] = str

    def cell(self, run: Run) -> str:
        value = self.value(run)
        return "–" if value is None else self.show(value)


def _number(value: float) -> str:
    return f"{value:.2f}"


COLUMNS = (
    Column("method", lambda run: " + ".join(run.report.citations) or None),
    Column("pattern", lambda run: _patterns(run.report)),
    Column("coverage", lambda run: run.report.summary.coverage, percent),
    Column("energy", lambda run: run.report.summary.kept_energy, percent),
    Column("output error", lambda run: run.report.summary.error, percent),
    Column("perplexity before", lambda run: METRICS["perplexity_before"](run.report), _number),
    Column("perplexity", lambda run: METRICS["perplexity"](run.report), _number),
    Column("ratio", lambda run: METRICS["perplexity_ratio"](run.report), lambda value: f"{value:.4f}"),
    Column("gap", lambda run: run.report.summary.gap, tiny),
    Column("time", lambda run: run.report.summary.seconds, duration),
    Column("peak memory", lambda run: run.report.summary.peak_memory_bytes, size),
    Column("cost", lambda run: run.cost, lambda value: f"{value:.4f}"),
    Column("device", lambda run: run.report.device),
)


def columns_of(runs: Sequence[Run]) -> list[Column]:
    """Those that some run has."""
    return [column for column in COLUMNS if any(column.value(run) is not None for run in runs)]


def as_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Titles, and a row of cells for each run; what none of them has is left out."""
    columns = columns_of(runs)
    return ["", *(column.title for column in columns)], [[run.name, *(c.cell(run) for c in columns)] for run in runs]


def as_markdown(runs: Sequence[Run]) -> str:
    """A table, and what has to be said about it."""
    titles, rows = as_rows(runs)
    lines = [titles, ["---"] * len(titles), *([_escaped(cell) for cell in row] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([table, *remarks(runs)]) + "\n"


def as_csv(runs: Sequence[Run]) -> str:
    """All numbers as they are, empty where a run does not have one."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "method", "pattern", *METRICS, "cost", "device"])
    for run in runs:
        method, pattern = (column.cell(run) for column in COLUMNS[:2])
        writer.writerow([run.name, method, pattern, *run.metrics.values(), run.cost, run.report.device])
    return out.getvalue()


def as_data(runs: Sequence[Run]) -> dict[str, Any]:
    """For --json."""
    return {
        "schema_version": 1,
        "runs": [
            {
                "run": run.name,
                "method": list(run.report.citations),
                "pattern": _patterns(run.report),
                **run.metrics,
                "cost": run.cost,
                "device": run.report.device,
            }
            for run in runs
        ],
    }


def remarks(runs: Sequence[Run]) -> list[str]:
    """Why figures may not be comparable."""
    found = []
    if len({run.report.model["source"] for run in runs}) > 1:
        found.append("The runs pruned different models.")
    if len({run.report.training is None for run in runs}) > 1:
        found.append("Some runs are fine-tuned: before is the pruned model there, and the time is that of training.")
    texts = {
        (text["tokens_sha256"], text["dtype"])
        for run in runs
        if run.report.perplexity is not None
        for text in (run.report.perplexity["before"],)
    }
    if len(texts) > 1:
        found.append("Perplexities were measured on different tokens or in different dtypes: do not compare them.")
    if len({(run.report.device, run.report.threads) for run in runs}) > 1:
        found.append("The runs used different devices or numbers of threads.")
    return found


def _patterns(report: Report) -> str | None:
    found = dict.fromkeys(
        f"{record.pattern} {'transposable' if record.transposable else 'standard'}"
        for record in report.tensors
        if record.pattern is not None
    )
    return ", ".join(found) or None


def _escaped(cell: str) -> str:
    """Nothing in a name ends a cell or a line, or is HTML."""
    for char in "\\|<>`*_[]":
        cell = cell.replace(char, f"\\{char}")
    return " ".join(cell.split())
