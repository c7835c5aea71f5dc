"""What an unfinished run has done so far, so that another one can go on: a file of JSON lines, only ever appended to.

Each process of a run that torchrun has started appends to a file of its own: journal, journal-1, journal-2.

The first line says which run it is; every further one is a note of something finished. A line that a crash tore is
dropped with all after it. The journal is not synced line by line: after a power cut it may be ahead of the tensors it
speaks of, so nothing in it is believed before the bytes on disk have the hash that it names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

Identity: TypeAlias = dict[str, str]  # everything that decides the bytes of an output, by the name users know it by


class Journal:
    """The journal at `path`, which need not exist; `identity` is that of the run it was begun by, if it does.

    What other processes of that run have noted beside it is read, too.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._notes: list[tuple[str, dict[str, Any]]] = []
        lines, self._end = _whole_lines(path)
        self.identity: Identity | None = lines[0]["identity"] if lines else None
        for beside in sorted(path.parent.glob(f"{path.name}-*")):
            found, _ = _whole_lines(beside)
            lines += found[1:] if found and found[0]["identity"] == self.identity else []
        self._notes = [(kind, facts) for line in lines[1:] for kind, facts in line.items()]

    def __len__(self) -> int:
        return len(self._notes)

    def notes(self, kind: str) -> list[dict[str, Any]]:
        """What was noted under this name, in order."""
        return [facts for of_kind, facts in self._notes if of_kind == kind]

    def begin(self, identity: Identity) -> None:
        """Forget everything and begin anew."""
        self.identity, self._notes, self._end = identity, [], 0
        self._append({"identity": identity})

    def of_process(self, rank: int) -> Journal:
        """The same, and what is noted from now on goes to the file of another process than the first."""
        if rank == 0:
            return self
        own = Journal(self._path.with_name(f"{self._path.name}-{rank}"))
        if own.identity != self.identity:
            assert self.identity is not None, "the first process has begun"
            own.begin(self.identity)
        own._notes = list(self._notes)
        return own

    def note(self, kind: str, facts: dict[str, Any]) -> None:
        """Add one line."""
        self._append({kind: facts})
        self._notes.append((kind, facts))

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("r+b" if self._path.exists() else "wb") as file:
            file.truncate(self._end)  # a torn line would swallow this one
            file.seek(self._end)
            self._end += file.write(json.dumps(line, allow_nan=False).encode() + b"\n")


def _whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines up to the first that is not whole, and where they end in the file."""
    lines: list[dict[str, Any]] = []
    end = 0
    for raw in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        try:
            line = json.loads(raw)
        except ValueError:
            break
        if not raw.endswith(b"\n") or not isinstance(line, dict) or (not lines and not line.get("identity")):
            break
        lines.append(line)
        end += len(raw)
    return lines, end
