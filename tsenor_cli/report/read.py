"""Reading a report that someone may have made or changed by hand: it fits the schema, or is refused."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from textwrap import shorten
from typing import Any

from tsenor_cli.checkpoint.jsonfile import read_object
from tsenor_cli.checkpoint.writer import REPORT_FILE
from tsenor_cli.errors import InputRefused
from tsenor_cli.report.records import SCHEMA_VERSION, Report


def read_report(directory: Path) -> Report:
    """The report of a pruned checkpoint.

    Raises:
        InputRefused: there is none, or it is not one of this version.
    """
    from jsonschema import Draft202012Validator  # only those who read need it

    path = directory / REPORT_FILE
    if not path.is_file():
        raise InputRefused(f"{directory} has no {REPORT_FILE}", "name what tsenor prune has made", code="no-report")
    facts = read_object(path)
    found = shorten(repr(facts.get("schema_version")), 20)
    if found != repr(SCHEMA_VERSION):
        raise InputRefused(
            f"{path} has schema version {found}, and {SCHEMA_VERSION} is known",
            "use the version of tsenor that wrote it, or prune again",
            code="report-version",
        )
    for error in Draft202012Validator(_schema()).iter_errors(facts):
        where = shorten(error.json_path, 80)
        raise InputRefused(
            f"{path} is not a report of tsenor, at {where}: {shorten(error.message, 120)}",
            "it is damaged or changed: prune again",
            code="damaged-report",
        )
    return Report.from_dict(facts)


def _schema() -> dict[str, Any]:
    return dict(json.loads((files("tsenor_cli.report") / "schema.json").read_text(encoding="utf-8")))
