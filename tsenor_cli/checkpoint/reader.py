"""A checkpoint on disk as an index of tensors, its config, index and headers checked before anything is trusted."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tsenor_cli.checkpoint.jsonfile import read_object
from tsenor_cli.checkpoint.shard import DiskTensor, Shard, read_shard
from tsenor_cli.checkpoint.source import is_other_format
from tsenor_cli.errors import InputRefused

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
MASKS_DIRECTORY = "tsenor-masks"  # maskfile.py
NEVER_COPIED = frozenset({".git", ".cache", MASKS_DIRECTORY})  # directories of tools, and masks of these very weights

# How sparse and quantised formats name their parts; their config.json does not always say so.
_PACKED_SUFFIXES = (".weight_packed", ".bitmask", ".compressed", ".qweight", ".weight_scale", ".weight_scale_inv")


@dataclass(frozen=True)
class Checkpoint:
    """A local checkpoint directory, its headers checked."""

    directory: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    revision: str | None = None  # the hub commit, if it came from the hub

    @cached_property
    def tensors(self) -> dict[str, DiskTensor]:
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    def close(self) -> None:
        """Remove what opening it has put on the disk, which is nothing."""

    @property
    def fetched_bytes(self) -> int:
        """What of it takes space beside the output during a run: nothing, it is here already."""
        return 0

    @property
    def stamps(self) -> dict[str, str]:
        """What tells versions of a file apart: size and time of change, by which make and git know them.

        With a commit of the hub the size is enough: every machine has fetched it at another time.
        """
        found = {}
        for path in [*(shard.path.relative_to(self.directory) for shard in self.shards), *self.other_files]:
            facts = (self.directory / path).stat()
            time = "of the commit" if self.revision is not None else f"of time {facts.st_mtime_ns}"
            found[str(path)] = f"{facts.st_size} bytes {time}"
        return found

    @cached_property
    def other_files(self) -> tuple[Path, ...]:
        """Every file but the shards and dense copies in other formats, relative to the directory."""
        return tuple(path for path in self._rest if not is_other_format(path.as_posix()))

    def check_other_files(self) -> None:
        """Open each of them once: better now than when all the work is done.

        Raises:
            InputRefused: one cannot be read.
        """
        for path in self.other_files:
            try:
                (self.directory / path).open("rb").close()
            except OSError as error:
                raise InputRefused(f"{self.directory / path}: {error.strerror}", "make it readable") from error

    @cached_property
    def other_bytes(self) -> int:
        """Of those."""
        return sum((self.directory / path).stat().st_size for path in self.other_files)

    @cached_property
    def left_out_files(self) -> tuple[Path, ...]:
        """Dense copies of the weights in other formats, relative to the directory."""
        return tuple(path for path in self._rest if is_other_format(path.as_posix()))

    @cached_property
    def _rest(self) -> tuple[Path, ...]:
        shards = {shard.path.name for shard in self.shards}
        found = []
        for path in sorted(self.directory.rglob("*")):
            relative = path.relative_to(self.directory)
            linked = path.is_symlink() and path.is_dir()  # whose files have not been found
            if relative.parts[0] in NEVER_COPIED or str(relative) in shards or (path.is_dir() and not linked):
                continue
            check_contained(path, self.directory)
            if linked or not path.is_file():
                what = "a link to a directory" if linked else "not a regular file"
                raise InputRefused(f"{path} is {what}", "remove it from the checkpoint", code="unsafe-file")
            found.append(relative)
        return tuple(found)


def open_checkpoint(directory: Path, revision: str | None = None) -> Checkpoint:
    """Read and check config, index and every header of the checkpoint in `directory`.

    Raises:
        InputRefused: anything missing, damaged, quantised, or pointing outside the directory.
    """
    try:
        return _open_checkpoint(directory, revision)
    except OSError as error:
        raise InputRefused(f"{error.filename or directory}: {error.strerror or error}", "make it readable") from error


def _open_checkpoint(directory: Path, revision: str | None) -> Checkpoint:
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise InputRefused(
            f"{directory} has no config.json", "give the directory of a transformers checkpoint", code="no-checkpoint"
        )
    check_contained(config_path, directory)
    config = read_object(config_path)
    _refuse_quantised(directory, config)
    shards = tuple(read_shard(path) for path in _shard_paths(directory))
    if _outgrow_cache(shards):
        shards = tuple(shard.uncached() for shard in shards)
    checkpoint = Checkpoint(directory, config, shards, revision)
    _check_index(checkpoint)
    packed = next((name for name in checkpoint.tensors if name.endswith(_PACKED_SUFFIXES)), None)
    if packed is not None:
        raise InputRefused(
            f"{directory} holds packed weights ({packed})",
            "prune the original floating-point checkpoint",
            code="quantised-checkpoint",
        )
    return checkpoint


def _outgrow_cache(shards: tuple[Shard, ...]) -> bool:
    """Larger than half of the memory: the system cannot keep them for whoever reads them next."""
    if sys.platform != "linux":
        return False
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return sum(shard.nbytes for shard in shards) > memory / 2


def check_contained(path: Path, directory: Path) -> None:
    """Refuse a link that leads out of the checkpoint, except into the blobs of the hub's own cache.

    Copying through such a link would put a file of the user's into the output.
    """
    try:
        target, root = path.resolve(), directory.resolve()
    except (OSError, RuntimeError) as error:  # the latter for links in a circle, before Python 3.13
        raise InputRefused(
            f"{path} cannot be followed ({error})", "remove it from the checkpoint", code="unsafe-file"
        ) from error
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (target.is_relative_to(root) or target.is_relative_to(blobs)):
        raise InputRefused(
            f"{path} links out of the checkpoint", "replace the link by the file itself", code="unsafe-file"
        )


def _shard_paths(directory: Path) -> list[Path]:
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file() and index.is_file():
        raise InputRefused(
            f"{directory} has both {SINGLE_FILE} and {INDEX_FILE}",
            "remove the one that is out of date",
            code="inconsistent-checkpoint",
        )
    if single.is_file():
        names = [SINGLE_FILE]
    elif index.is_file():
        names = sorted(set(weight_map(directory).values()))
    else:
        raise _no_weights(directory)
    paths = [directory / name for name in names]
    for path in paths:
        if not path.is_file():
            raise InputRefused(
                f"{path} is missing", f"{INDEX_FILE} names it: fetch it again", code="inconsistent-checkpoint"
            )
        check_contained(path, directory)
    return paths


def _no_weights(directory: Path) -> InputRefused:
    """Why a directory without SINGLE_FILE and INDEX_FILE has no weights of a model."""
    if any(directory.glob("*-of-*.safetensors")):
        return InputRefused(
            f"{directory / INDEX_FILE} is missing",
            "it says which weights are where: fetch it again",
            code="inconsistent-checkpoint",
        )
    if others := sorted(path.name for path in directory.glob("*.safetensors")):
        return InputRefused(  # an adapter, a variant, another library's
            f"{directory} has {others[0]}, but no {SINGLE_FILE}",
            f"name it {SINGLE_FILE} if a whole model is in it, as save_pretrained writes it",
            code="no-safetensors",
        )
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(pattern))
    why = f"has only pickled weights ({pickles[0]})" if pickles else "has no safetensors weights"
    return InputRefused(
        f"{directory} {why}", "convert it with save_pretrained; tsenor never opens pickles", code="no-safetensors"
    )


def weight_map(directory: Path) -> dict[str, str]:
    """The index's tensor → file map, every file a plain name inside the directory."""
    path = directory / INDEX_FILE
    check_contained(path, directory)
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputRefused(f"{path} has no weight_map", "the file is damaged: fetch it again", code="damaged-json")
    for name in weight_map.values():
        if not (isinstance(name, str) and name.isprintable() and re.fullmatch(r"[^/\\:]+\.safetensors", name)):
            raise InputRefused(
                f"{path} names {name!r}, not a safetensors file beside it",
                "do not trust this checkpoint",
                code="unsafe-index",
            )
    return weight_map


def _check_index(checkpoint: Checkpoint) -> None:
    """Every tensor stands in exactly one shard, and in the one that the index names."""
    if len(checkpoint.tensors) != sum(len(shard.tensors) for shard in checkpoint.shards):
        names = Counter(tensor.name for shard in checkpoint.shards for tensor in shard.tensors)
        twice = next(name for name, count in names.items() if count > 1)
        raise InputRefused(
            f"{checkpoint.directory}: tensor {twice!r} is in two shards",
            "fetch the checkpoint again",
            code="inconsistent-checkpoint",
        )
    if not (checkpoint.directory / INDEX_FILE).is_file():
        return
    for name, file in weight_map(checkpoint.directory).items():
        tensor = checkpoint.tensors.get(name)
        if tensor is None or tensor.path.name != file:
            raise InputRefused(
                f"tensor {name!r} is not in {file}, where the index puts it",
                "fetch the checkpoint again",
                code="inconsistent-checkpoint",
            )


def _refuse_quantised(directory: Path, config: dict[str, Any]) -> None:
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    for key in ("quantization_config", "compression_config", "sparsity_config"):
        if any(part.get(key) for part in parts):
            raise InputRefused(
                f"{directory} is already quantised or compressed ({key} in config.json)",
                "prune the original floating-point checkpoint",
                code="quantised-checkpoint",
            )
