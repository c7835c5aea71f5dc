"""Parts of an output, made by jobs that know nothing of each other: OUTPUT.part-2-of-8, some whole shards each."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from tsenor_cli.checkpoint.writer import copy_file
from tsenor_cli.errors import InputRefused, OutputUnavailable
from tsenor_cli.specs import Part


def part_directory(output: Path, part: Part) -> Path:
    """Where one part of `output` is made.

    Raises:
        OutputUnavailable: it has no name, as the root.
    """
    if not output.name:
        raise OutputUnavailable(f"{output} has no name that parts could have", "give another -o")
    return output.with_name(f"{output.name}.part-{part.number}-of-{part.count}")


def parts_beside(output: Path) -> dict[Path, int]:
    """The directories that are named as parts of `output`, and of how many."""
    name = re.compile(re.escape(output.name) + r"\.part-([1-9][0-9]*)-of-([1-9][0-9]*)")
    beside = {path: name.fullmatch(path.name) for path in output.parent.glob("*")}
    return {path: int(match[2]) for path, match in beside.items() if match and path.is_dir()}


def find_parts(output: Path) -> list[Path]:
    """The directories of all parts, in order.

    Raises:
        InputRefused: there are none, some are missing, or there are such of several counts.
    """
    found = parts_beside(output)
    counts = sorted(set(found.values()))
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


def remove_parts(output: Path) -> None:
    """All parts, under another name first, so that a part is whole or not there."""
    sweep_parts(output)  # one that was made again has such a name to take
    for part in parts_beside(output):
        part.rename(part.with_name(part.name.replace(output.name, _gone(output).name, 1)))
    sweep_parts(output)


def sweep_parts(output: Path) -> None:
    """Those that have the other name."""
    for part in parts_beside(_gone(output)):
        shutil.rmtree(part)


def removal_has_begun(output: Path) -> bool:
    """Whether `remove_parts` was stopped."""
    return bool(parts_beside(_gone(output)))


def _gone(output: Path) -> Path:
    """Whose parts those are that are being removed."""
    return output.parent / f".{output.name}.gone"


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
