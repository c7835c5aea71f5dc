"""A checkpoint of the hub that is read without being kept: its shards come one after the other, and go again.

    a directory in TMPDIR               everything but the shards; and in the place of a shard, while it can be read,
                                        a link to
    OUTPUT.tsenor-partial/input         the shard that is read, and the next one, which is being fetched meanwhile
    OUTPUT.tsenor-partial/samples       the few weights of every shard that the report shows, for when it is gone

So what is large lies where the output needs as much space anyway, held by its lock and swept with it, however a run
ends; and where nothing is to be read, there is nothing, rather than a hole that reads as zeros.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread
from typing import Any

from tsenor_cli.checkpoint.hub import Repository, find_repository
from tsenor_cli.checkpoint.plan import TensorPlan
from tsenor_cli.checkpoint.reader import INDEX_FILE, NEVER_COPIED, SINGLE_FILE, Checkpoint, open_checkpoint, weight_map
from tsenor_cli.checkpoint.shard import Shard
from tsenor_cli.checkpoint.source import hub_id, is_offline, is_other_format, local_path
from tsenor_cli.errors import InputRefused, TsenorError, UsageError
from tsenor_cli.overlap import ahead

_AT_ONCE = 8  # small files, as huggingface_hub fetches them
_PATIENCE_S = 0.5  # with a download that was told to stop: nobody waits two seconds for the end (cli/signals.py)


class _Directory:
    """A temporary directory that goes with `remove`, or when nothing refers to it any more, or the process ends."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="tsenor-")).resolve()
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class RemoteCheckpoint(Checkpoint):
    """A checkpoint of which everything but the shards is here; they come with `fetched`."""

    repository: Repository
    place: _Directory  # what `directory` is the path of

    @property
    def stamps(self) -> dict[str, str]:
        """What tells versions of a file apart: the hub's hashes of their content."""
        names = [*(shard.path.name for shard in self.shards), *(path.as_posix() for path in self.other_files)]
        files = self.repository.files
        return {name: f"{files[name].size} bytes of hash {files[name].content}" for name in names}

    @property
    def fetched_bytes(self) -> int:
        """What of it is on the disk at a time, at the most: a shard, and the next one."""
        sizes = [shard.nbytes for shard in self.shards]
        return max((sum(pair) for pair in pairwise([*sizes, 0])), default=0)

    def close(self) -> None:
        """Remove what opening it has put on the disk."""
        self.place.remove()


def open_remote(model: str) -> RemoteCheckpoint:
    """Fetch everything but the tensors of a hub id, and check it as if it lay here.

    All of it is of one commit, that which the revision means now.

    Raises:
        UsageError: `model` is a directory, or the hub is off.
        InputRefused: the hub has no such checkpoint, or it is one that open_checkpoint refuses.
    """
    repository = find_repository(*_hub_id(model))
    place = _Directory()
    try:
        _fetch_all_but_tensors(repository, place.path)
        here = open_checkpoint(place.path, repository.commit)
    except InputRefused as error:  # people know the repository, not the directory
        place.remove()
        message = error.message.replace(str(place.path), repository.name)
        raise InputRefused(message, error.remedy, code=error.code) from error
    for shard in here.shards:
        shard.path.unlink()
    return RemoteCheckpoint(here.directory, here.config, here.shards, here.revision, repository=repository, place=place)


def fetched(
    checkpoint: Checkpoint, items: Iterable[TensorPlan], scratch: Path, samples: Mapping[str, int]
) -> Iterator[Iterable[TensorPlan]]:
    """Tensors in groups that can be read one after the other: those of a shard, or all of a checkpoint that is here.

    While a group is out its shard is here and the next one is being fetched; no other is on the disk.

    Args:
        checkpoint: that they are of.
        items: what is to be read.
        scratch: the run's directory for files that only it needs.
        samples: how many of the first bytes of which tensors are wanted after all groups.

    Raises:
        TsenorError: a shard cannot be fetched.
    """
    if isinstance(checkpoint, RemoteCheckpoint):
        yield from _Incoming(checkpoint, scratch, samples).groups(items)
    else:
        yield items


class _Incoming:
    """The shards of one run."""

    def __init__(self, checkpoint: RemoteCheckpoint, scratch: Path, samples: Mapping[str, int]) -> None:
        self._checkpoint = checkpoint
        self._content, self._samples = scratch / "input", scratch / "samples"
        self._wanted = samples
        self._stopped = Event()

    def groups(self, items: Iterable[TensorPlan]) -> Iterator[list[TensorPlan]]:
        of_shard: dict[Path, list[TensorPlan]] = defaultdict(list)
        for item in items:
            of_shard[item.tensor.path].append(item)
        coming: Future[None] | None = None
        try:
            left = self._begin(of_shard.keys())
            for shard, following in zip(left, [*left[1:], None], strict=False):
                (coming or self._fetching(shard)).result()
                coming = self._fetching(following) if following is not None else None
                yield of_shard[shard.path]
                self._give_back(shard)
        finally:
            self._stopped.set()
            wait([coming] if coming is not None else [], _PATIENCE_S)
            shutil.rmtree(self._content, ignore_errors=True)

    def _begin(self, paths: Iterable[Path]) -> list[Shard]:
        """The shards to fetch. One that an interrupted run has done is not, as there are the samples of it."""
        shutil.rmtree(self._content, ignore_errors=True)
        self._samples.mkdir(exist_ok=True)
        needed = set(paths)
        for shard in self._checkpoint.shards:
            if (self._samples / shard.path.name).exists():
                _link(shard.path, self._samples / shard.path.name)
            else:
                needed.add(shard.path)
        return [shard for shard in self._checkpoint.shards if shard.path in needed]

    def _fetching(self, shard: Shard) -> Future[None]:
        """Begin to fetch, in a thread that the end of the process does not wait for."""
        future: Future[None] = Future()

        def work() -> None:
            try:
                self._fetch(shard)
            except BaseException as error:  # noqa: BLE001  (it is raised where somebody waits)
                future.set_exception(error)
            else:
                future.set_result(None)

        Thread(target=work, name=f"fetching {shard.path.name}", daemon=True).start()
        return future

    def _fetch(self, shard: Shard) -> None:
        found = self._checkpoint.repository.fetch_shard(shard.path.name, self._content, self._stopped)
        start = len(shard.header).to_bytes(8, "little") + shard.header
        with found.open("rb") as file:
            if file.read(len(start)) != start or found.stat().st_size != shard.nbytes:
                raise TsenorError(
                    f"{shard.path.name} of {self._checkpoint.repository.name} is not what it was when the run began",
                    "try again, or find out what changes files between the hub and here",
                    code="fetch-failed",
                )
        self._keep_samples(shard, found)
        _link(shard.path, found)

    def _keep_samples(self, shard: Shard, found: Path) -> None:
        """Before anything of the shard is done, so that what is done has them: a file of holes, but for the samples."""
        unfinished = found.with_name(found.name + ".samples")
        with found.open("rb") as source, unfinished.open("wb") as target:
            for tensor in shard.tensors:
                if count := self._wanted.get(tensor.name, 0):
                    source.seek(tensor.start)
                    target.seek(tensor.start)
                    target.write(source.read(count))
            target.flush()
            os.fsync(target.fileno())
        unfinished.replace(self._samples / shard.path.name)

    def _give_back(self, shard: Shard) -> None:
        _link(shard.path, self._samples / shard.path.name)
        (self._content / shard.path.name).unlink()


def _hub_id(model: str) -> tuple[str, str | None]:
    if model and local_path(model).is_dir():
        raise UsageError(
            f"--no-cache-input is for models of the hub, and {model} is a directory: nothing of it is kept anywhere",
            "leave it out",
            code="cannot-stream",
        )
    if is_offline():
        raise UsageError(
            "--no-cache-input fetches from the hub, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids that",
            "unset it, or leave the option out to use what is in the cache",
            code="cannot-stream",
        )
    return hub_id(model)


def _fetch_all_but_tensors(repository: Repository, directory: Path) -> None:
    """Everything that a download would bring; of the shards, a file of the same size with their header alone."""
    names = [name for name in repository.files if name.split("/")[0] not in NEVER_COPIED and not is_other_format(name)]
    weights = [name for name in names if name.endswith(".safetensors")]
    _together(repository.fetch_small, ((name, directory) for name in names if name not in weights))
    shards = {SINGLE_FILE}
    if (directory / INDEX_FILE).is_file():
        shards.update(weight_map(directory).values())
    _together(repository.fetch_small, ((name, directory) for name in weights if name not in shards))
    _together(_hold_place, ((repository, name, directory) for name in weights if name in shards))


def _together(work: Callable[..., object], arguments: Iterable[tuple[Any, ...]]) -> None:
    for _ in ahead(work, arguments, _AT_ONCE, threads=_AT_ONCE):
        pass


def _hold_place(repository: Repository, name: str, directory: Path) -> None:
    """A shard's header, and a hole for its tensors: what it takes to read headers."""
    with (directory / name).open("wb") as file:
        file.write(repository.start_of_shard(name))
        file.truncate(repository.files[name].size)


def _link(path: Path, target: Path) -> None:
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(path)
