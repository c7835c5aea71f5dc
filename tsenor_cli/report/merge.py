"""One report of several: of parts of one output that jobs have made without knowing of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tsenor_cli.report.build import summarise
from tsenor_cli.report.costs import known_sum
from tsenor_cli.report.records import Histogram, Report


def merge_reports(parts: Sequence[Report]) -> Report:
    """The report of a run that had made all parts; time and memory are those of the longest and the largest."""
    first, longest = parts[0], max(parts, key=lambda part: part.summary.seconds)
    records = sorted((record for part in parts for record in part.tensors), key=lambda record: record.file)
    places = {record.name: place for place, record in enumerate(records)}
    tiles = [part.tile for part in parts if part.tile is not None]
    summary = summarise(
        records,
        checkpoint_bytes=sum(part.summary.checkpoint_bytes for part in parts),
        seconds=longest.summary.seconds,
        stages=longest.summary.stages,
        peak_memory_bytes=max(part.summary.peak_memory_bytes for part in parts),
        read_bytes=known_sum([part.summary.read_bytes for part in parts]),
        written_bytes=known_sum([part.summary.written_bytes for part in parts]),
    )
    return replace(
        first,
        processes=sum(part.processes for part in parts),
        summary=summary,
        tensors=records,
        citations={name: text for part in parts for name, text in part.citations.items()},
        tile=min(tiles, key=lambda tile: places[tile.tensor], default=None),
        histogram=_histogram([part.histogram for part in parts if part.histogram is not None]),
    )


def _histogram(parts: Sequence[Histogram]) -> Histogram | None:
    if not parts:
        return None
    return Histogram(
        sum(part.tensors for part in parts),
        sum(part.weights for part in parts),
        parts[0].edge,
        [sum(counts) for counts in zip(*(part.before for part in parts), strict=True)],
        [sum(counts) for counts in zip(*(part.after for part in parts), strict=True)],
    )
