"""The files of the output: shards, headers first and tensors in any order, files of masks, everything else copied."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tsenor_cli.checkpoint.reader import Checkpoint
from tsenor_cli.checkpoint.shard import COPY_BYTES, DiskTensor, Shard

if TYPE_CHECKING:
    import torch

SETTLE_BYTES = 64 * 2**20
REPORT_FILE, PAGE_FILE, CARD_FILE = "tsenor-report.json", "tsenor-report.html", "README.md"
WRITTEN_ANEW = frozenset(map(Path, (REPORT_FILE, PAGE_FILE, CARD_FILE)))  # of the output, never the input's


class Place:
    """Where the bytes of one tensor go, one part after the other."""

    def __init__(self, file: BinaryIO, hasher: ThreadPoolExecutor, written: Callable[[int, int], None]) -> None:
        self._file, self._hasher, self._written = file, hasher, written
        self._start = file.tell()  # of what `written` has not been told of
        self._digest = hashlib.sha256()
        self._hashing: Future[None] | None = None

    def write(self, part: bytearray | memoryview) -> None:
        """Write the next part; it is hashed meanwhile, and must not be changed any more."""
        if self._hashing is not None:
            self._hashing.result()
        self._hashing = self._hasher.submit(self._digest.update, part)
        self._file.write(part)
        if self._file.tell() - self._start >= SETTLE_BYTES:
            self.tell()

    def tell(self) -> None:
        """Say what has been written since the last time."""
        self._file.flush()
        end = self._file.tell()
        self._written(self._start, end - self._start)
        self._start = end

    def sha256(self) -> str:
        """Of all that was written."""
        if self._hashing is not None:
            self._hashing.result()
        return self._digest.hexdigest()


class OutputShards:
    """The shards of the output, and files of masks: headers first, and tensors put in their places in any order.

    A shard's header is the input's, byte for byte, unless `format: pt` is missing (older loaders crash without it).
    What an interrupted run has put there stays.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        staging: Path,
        mine: Collection[str] | None = None,
        masks: Sequence[Shard] = (),
    ) -> None:
        """Begin the files.

        Args:
            checkpoint: the input.
            staging: the directory of the output.
            mine: the tensors that this process writes; None for all.
            masks: the files that packed masks go to (maskfile.py), beside the shards of the input; none is there.
        """
        self._staging, self._input = staging, checkpoint.directory
        self._masks = {mask.name: mask for file in masks for mask in file.tensors}
        self._missing: dict[Path, set[str]] = {}  # tensors that are not there yet, by shard
        self._shifts: dict[Path, int] = {}  # from places in the input's shard to those in the output's
        self._hasher, self._syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)  # their threads end with this object
        self._syncing: list[Future[None]] = []
        self._unsettled: dict[Path, list[tuple[int, int]]] = defaultdict(list)  # what the system's cache holds
        for shard in (*checkpoint.shards, *masks):
            header = _header(shard)
            _begin_with(self._path(shard.path), len(header).to_bytes(8, "little") + header)
            wanted = {tensor.name for tensor in shard.tensors if mine is None or tensor.name in mine}
            if wanted or mine is None:
                self._missing[shard.path] = wanted
            self._shifts[shard.path] = len(header) - len(shard.header)

    @contextmanager
    def place_of(self, tensor: DiskTensor) -> Iterator[Place]:
        """The tensor's place in its shard. When its last tensor is there, a shard is put to disk behind the back."""
        with self._path(tensor.path).open("r+b") as file:
            file.seek(self.there(tensor).start)
            place = Place(file, self._hasher, partial(self._settle, self._path(tensor.path)))
            yield place
            place.tell()
        self._arrived(tensor)

    @contextmanager
    def places_of(self, tensor: DiskTensor) -> Iterator[tuple[Place, Place | None]]:
        """The tensor's place, and that of its mask if it is saved."""
        mask = self.mask_of(tensor)
        with self.place_of(tensor) as place, nullcontext() if mask is None else self.place_of(mask) as mask_place:
            yield place, mask_place

    def mask_of(self, tensor: DiskTensor) -> DiskTensor | None:
        """Its packed mask, if it is saved: a tensor of the same name, with a place of its own."""
        return self._masks.get(tensor.name)

    def has(self, tensor: DiskTensor, sha256: str | None) -> bool:
        """Whether the bytes with this hash are there already."""
        found, left = hashlib.sha256(), tensor.nbytes
        with self._path(tensor.path).open("r+b") as file:
            file.seek(self.there(tensor).start)
            while left and (part := file.read(min(left, COPY_BYTES))):
                found.update(part)
                left -= len(part)
        there = not left and found.hexdigest() == sha256
        if there:
            self._arrived(tensor)
        return there

    def there(self, tensor: DiskTensor) -> DiskTensor:
        """The tensor in the output."""
        shift = self._shifts[tensor.path]
        return replace(tensor, path=self._path(tensor.path), start=tensor.start + shift, stop=tensor.stop + shift)

    def read(self, tensor: DiskTensor) -> torch.Tensor:
        """A tensor that is there."""
        return self.there(tensor).read()

    def sync(self) -> None:
        """All that this process has written is on the disk when this returns."""
        for syncing in self._syncing:
            syncing.result()
        for path in self._missing:
            _sync_file(self._path(path))

    def _settle(self, path: Path, start: int, nbytes: int) -> None:
        """Put to disk what has been written so far, once it is worth it."""
        ranges = self._unsettled[path]
        ranges.append((start, nbytes))
        if sum(length for _, length in ranges) >= SETTLE_BYTES:
            self._syncing.append(self._syncer.submit(_settle, path, self._unsettled.pop(path)))

    def _arrived(self, tensor: DiskTensor) -> None:
        missing = self._missing[tensor.path]
        missing.discard(tensor.name)
        if not missing:
            self._syncing.append(self._syncer.submit(_sync_file, self._path(tensor.path)))

    def _path(self, shard: Path) -> Path:
        return self._staging / shard.relative_to(self._input)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """What of a tensor on the CPU goes to disk."""
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def copy_file(source: Path, target: Path) -> None:
    """Copy contents (not permissions or links), synced to disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer)
        _sync(writer)


def write_text(target: Path, text: str) -> None:
    """Write a UTF-8 file, synced to disk. Paths may hold bytes that are none: they are escaped, as JSON does."""
    with target.open("wb") as writer:
        writer.write(text.encode(errors="backslashreplace"))
        _sync(writer)


def _begin_with(path: Path, start: bytes) -> None:
    """Make a file that begins like this, unless there is one."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(start)) == start:
                return
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(start)


def _header(shard: Shard) -> bytes:
    if shard.metadata.get("format") == "pt":
        return shard.header
    entries = json.loads(shard.header)
    return encode_header({**entries, "__metadata__": {**shard.metadata, "format": "pt"}})


def encode_header(entries: Mapping[str, Any]) -> bytes:
    """The header of a safetensors file."""
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % 8)  # tensors stay aligned, as the format asks


def _settle(path: Path, ranges: list[tuple[int, int]]) -> None:
    with path.open("r+b") as file:
        settle(file, ranges)


def settle(file: BinaryIO, ranges: list[tuple[int, int]]) -> None:
    """Put to disk what has been written, and give its pages of the system's cache back: nobody reads it soon.

    The next writes get these pages again, which is several times as fast as pages that were never used
    (docs/measured.md), and what others have in the cache stays there.
    """
    _sync(file)
    if sys.platform == "linux":
        for start, nbytes in ranges:
            os.posix_fadvise(file.fileno(), start, nbytes, os.POSIX_FADV_DONTNEED)


def _sync_file(path: Path) -> None:
    with path.open("r+b") as file:
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
