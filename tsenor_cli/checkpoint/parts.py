"""Parts of an output, made by jobs that know nothing of each other: OUTPUT.part-2-of-8, some whole shards each."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from tsenor_cli.checkpoint.writer import copy_file
from tsenor_cli.errors import InputRefused
from tsenor_cli.specs import Part


def part_directory(output: Path, part: Part) -> Path:
    """Where one part of `output` is made."""
    return output.with_name(f"{output.name}.part-{part.number}-of-{part.count}")


def find_parts(output: Path) -> list[Path]:
    """The directories of all parts, in order.

    Raises:
        InputRefused: there are none, some are missing, or there are such of several counts.
    """
    name = re.compile(re.escape(output.name) + r"\.part-([1-9][0-9]*)-of-([1-9][0-9]*)")
    found = {path: match for path in output.parent.glob("*") if (match := name.fullmatch(path.name)) and path.is_dir()}
    counts = sorted({int(match[2]) for match in found.values()})
    if not counts:
        raise InputRefused(
            f"there is no part of {output}", "make them with tsenor prune --shard 1/N and so on", code="missing-parts"
        )
    if len(counts) > 1:
        raise InputRefused(
            f"there are parts of {counts[0]} and of {counts[1]} beside {output}",
            "remove those that are not meant",
            code="missing-parts",
        )
    parts = [part_directory(output, Part(number, counts[0])) for number in range(1, counts[0] + 1)]
    missing = [number for number, path in enumerate(parts, 1) if path not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputRefused(
            f"part {missing[0]} of {counts[0]}{more} is missing: {parts[missing[0] - 1]}",
            f"make it with --shard {missing[0]}/{counts[0]}",
            code="missing-parts",
        )
    return parts


def bring_together(parts: Sequence[Path], target: Path, left_out: Sequence[str]) -> None:
    """All files of the parts in one directory: shards get a second name, where the file system has such."""
    for part in parts:
        for path in sorted(part.rglob("*")):
            relative = path.relative_to(part)
            if path.is_file() and relative.as_posix() not in left_out:
                (target / relative).parent.mkdir(parents=True, exist_ok=True)
                if not (path.suffix == ".safetensors" and _link(path, target / relative)):
                    copy_file(path, target / relative)


def _link(path: Path, target: Path) -> bool:
    try:
        os.link(path, target)
    except OSError:
        return False
    return True
