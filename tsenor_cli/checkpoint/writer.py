"""The output: built in a staging directory beside its final place, made visible by one rename.

The output does not exist, or is the previous complete checkpoint, or is the new complete one; never a part.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from tsenor_cli.checkpoint.reader import Checkpoint, DiskTensor, Shard
from tsenor_cli.errors import OutputUnavailable, TsenorError

REPORT_FILE = "tsenor-report.json"


def check_output(output: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists or collides with the input, before any work is done.

    Raises:
        OutputUnavailable: it equals, contains or lies inside the input, or exists and may not be replaced.
    """
    real, real_source = output.resolve(), source.resolve()
    if real.is_relative_to(real_source) or real_source.is_relative_to(real):
        raise OutputUnavailable(f"the output {output} and the input {source} overlap", "give another -o")
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise OutputUnavailable(f"{output} exists", "give another -o, or --overwrite to replace it")
    if output.is_symlink() or not output.is_dir() or not _is_checkpoint(output):
        raise OutputUnavailable(f"{output} is not a checkpoint, so --overwrite leaves it alone", "give another -o")


def check_space(output: Path, needed_bytes: int) -> None:
    """Refuse to start when the new checkpoint cannot fit."""
    place = next(parent for parent in output.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise TsenorError(
            f"{place} has {free / 1e9:.2f} GB free and the output needs {needed_bytes / 1e9:.2f} GB",
            "free some space, or write elsewhere with -o",
        )


@contextmanager
def staged_output(output: Path) -> Iterator[Path]:
    """A staging directory that becomes `output` when the block ends well, and vanishes when it does not.

    Raises:
        OutputUnavailable: another run is writing the same output.
        TsenorError: the operating system refuses (disk full, no permission, read-only).
    """
    staging = output.with_name(output.name + ".tsenor-partial")
    lock = FileLock(output.with_name(output.name + ".tsenor-lock"))
    with _plain_os_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise OutputUnavailable(f"another run is writing {output}", "wait for it, or give another -o") from error
        try:
            _recover(staging, output)
            staging.mkdir()
            yield staging
            _sync_directories(staging)
            _swap_in(staging, output)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


class OutputShards:
    """The shards of the output: the headers of the input's, and tensors put in their places in any order.

    A header is the input's, byte for byte, unless `format: pt` is missing (older loaders crash without it).
    """

    def __init__(self, checkpoint: Checkpoint, staging: Path) -> None:
        self._starts: dict[Path, int] = {}  # where the data of each shard begins
        self._staging = staging
        for shard in checkpoint.shards:
            header = _header(shard)
            with self._path(shard.path).open("wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
            self._starts[shard.path] = 8 + len(header)
        self._data_starts = {shard.path: 8 + len(shard.header) for shard in checkpoint.shards}

    @contextmanager
    def place_of(self, tensor: DiskTensor) -> Iterator[BinaryIO]:
        """The tensor's shard, open where its bytes belong."""
        with self._path(tensor.path).open("r+b") as file:
            file.seek(self._starts[tensor.path] + tensor.start - self._data_starts[tensor.path])
            yield file

    def sync(self) -> None:
        """Everything is on the disk when this returns."""
        for path in self._starts:
            with self._path(path).open("r+b") as file:
                _sync(file)

    def _path(self, shard: Path) -> Path:
        return self._staging / shard.name


def copy_file(source: Path, target: Path) -> None:
    """Copy contents (not permissions or links), synced to disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer)
        _sync(writer)


def write_text(target: Path, text: str) -> None:
    """Write a UTF-8 file, synced to disk."""
    with target.open("wb") as writer:
        writer.write(text.encode())
        _sync(writer)


def _header(shard: Shard) -> bytes:
    if shard.metadata.get("format") == "pt":
        return shard.header
    entries = json.loads(shard.header)
    entries["__metadata__"] = {**shard.metadata, "format": "pt"}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % 8)  # tensors stay aligned, as the format asks


def _recover(staging: Path, output: Path) -> None:
    """Undo what a killed run left: its staging directory, or a swap that stopped half-way."""
    shutil.rmtree(staging, ignore_errors=True)
    old = _set_aside(output)
    if old.exists() and not output.exists():
        old.rename(output)


def _set_aside(output: Path) -> Path:
    return output.with_name(output.name + ".tsenor-old")


def _swap_in(staging: Path, output: Path) -> None:
    """Put the finished staging directory in place of `output`, which may exist."""
    old = _set_aside(output)
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
    try:
        staging.rename(output)
    except BaseException:  # a signal between the two renames included
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    _sync_directory(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def _is_checkpoint(path: Path) -> bool:
    return not any(path.iterdir()) or (path / REPORT_FILE).is_file() or (path / "config.json").is_file()


@contextmanager
def _plain_os_errors(output: Path) -> Iterator[None]:
    """The operating system's refusals as one line each."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        place = error.filename or output
        raise TsenorError(
            f"{place}: {reason}", "no output was written; mend this, or write elsewhere with -o"
        ) from error


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directories(root: Path) -> None:
    for directory, _, _ in os.walk(root):
        _sync_directory(Path(directory))


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
