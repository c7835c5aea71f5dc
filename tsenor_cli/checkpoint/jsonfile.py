"""JSON from a file we do not trust: bounded in size, no duplicate keys, always an object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tsenor_cli.errors import InputRefused

MAX_JSON_BYTES = 100_000_000  # the largest real index (a mixture of 100,000 experts) has about a tenth of this


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """Parse `text` as one JSON object; `where` names it in the error."""
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"{where} is not valid JSON ({error})", "the file is damaged: fetch it again") from error
    if not isinstance(value, dict):
        raise InputRefused(f"{where} is not a JSON object", "the file is damaged: fetch it again")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in `path`."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InputRefused(f"{path} is larger than {MAX_JSON_BYTES:,} bytes", "no real checkpoint needs that")
    return parse_object(path.read_bytes(), str(path))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found
