"""JSON from a file we do not trust: bounded in size and in what it unfolds to, no duplicate keys, always an object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tsenor_cli.errors import InputRefused

# The largest real ones, with 100,000 tensors, have 12 MB and 300,000 containers. Parsed, a byte becomes a dozen and a
# container 300: with these bounds less than half a GiB, whatever the file.
MAX_JSON_BYTES = 32 * 2**20
_MAX_CONTAINERS = 1_000_000


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """Parse `text` as one JSON object; `where` names it in the error."""
    if len(text) > MAX_JSON_BYTES or text.count(b"{") + text.count(b"[") > _MAX_CONTAINERS:
        raise InputRefused(
            f"{where} is larger than {MAX_JSON_BYTES:,} bytes or {_MAX_CONTAINERS:,} entries",
            "no real checkpoint needs that",
            code="damaged-json",
        )
    try:
        value = json.loads(text.decode(), object_pairs_hook=_no_duplicates, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise InputRefused(
            f"{where} is not valid JSON ({error})", "the file is damaged: fetch it again", code="damaged-json"
        ) from error
    if not isinstance(value, dict):
        raise InputRefused(f"{where} is not a JSON object", "the file is damaged: fetch it again", code="damaged-json")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in `path`."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InputRefused(
            f"{path} is larger than {MAX_JSON_BYTES:,} bytes", "no real checkpoint needs that", code="damaged-json"
        )
    return parse_object(path.read_bytes(), str(path))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _integer(text: str) -> int:
    """Not -0, which is a floating-point number to the readers of others."""
    if text == "-0":
        raise ValueError("-0 is not an integer")
    return int(text)
