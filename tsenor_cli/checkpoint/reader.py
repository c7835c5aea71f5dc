"""A checkpoint on disk as an index of tensors, read from the headers alone; bytes are read on demand.

Every header is checked here before anything is trusted, and nothing is memory-mapped: mapped pages would stay
resident, and a file that shrinks under a map kills the process.
The format: an 8-byte little-endian header length, a JSON header, then the tensors' bytes without holes
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tsenor_cli.checkpoint.jsonfile import MAX_JSON_BYTES, parse_object, read_object
from tsenor_cli.checkpoint.source import is_other_format
from tsenor_cli.errors import InputRefused

if TYPE_CHECKING:
    import torch

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
MASKS_DIRECTORY = "tsenor-masks"  # maskfile.py
NEVER_COPIED = frozenset({".git", ".cache", MASKS_DIRECTORY})  # directories of tools, and masks of these very weights
COPY_BYTES = 4 * 2**20

# Bits per element. Only the first four can be pruned; the rest are copied, or mark a quantised checkpoint.
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # what can be pruned
PRUNABLE_DTYPES = frozenset(TORCH_NAMES)
_OTHER_TORCH_NAMES = {
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
# How sparse and quantised formats name their parts; their config.json does not always say so.
_PACKED_SUFFIXES = (".weight_packed", ".bitmask", ".compressed", ".qweight", ".weight_scale", ".weight_scale_inv")


@dataclass(frozen=True)
class DiskTensor:
    """One tensor in one shard. `start` and `stop` are byte positions in the file."""

    name: str
    path: Path
    dtype: str  # as safetensors spells it: BF16, F32, …
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def parameters(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def torch_dtype(self) -> torch.dtype:
        """As torch calls it.

        Raises:
            InputRefused: torch has no such dtype.
        """
        import torch

        name = (TORCH_NAMES | _OTHER_TORCH_NAMES).get(self.dtype)
        if name is None:
            raise InputRefused(
                f"{self.name} is stored as {self.dtype}, which cannot be read",
                "it is quantised",
                code="quantised-checkpoint",
            )
        found: torch.dtype = getattr(torch, name)
        return found

    def read(self, first: int = 0, last: int | None = None, *, pinned: bool = False) -> torch.Tensor:
        """Rows `first` to `last` of the leading axis, in the tensor's own dtype; `pinned` for a copy to a GPU.

        Raises:
            InputRefused: torch has no such dtype.
        """
        import torch

        dtype = self.torch_dtype
        rows, *others = self.shape or (1,)
        count, row_bytes = len(range(*slice(first, last).indices(rows))), self.nbytes // max(rows, 1)
        raw = torch.empty(count * row_bytes, dtype=torch.uint8, pin_memory=pinned)
        self._fill(raw.numpy().data, first * row_bytes)
        return raw.view(dtype).view((count, *others) if self.shape else ())

    def read_bytes(self, first: int, last: int) -> bytearray:
        """Bytes `first` to `last` of the tensor, whatever its dtype."""
        buffer = bytearray(last - first)
        self._fill(memoryview(buffer), first)
        return buffer

    def forget(self) -> None:
        """Give back what the system's cache has of it."""
        with self.path.open("rb", buffering=0) as file:
            forget(file, self.start, self.nbytes)

    def chunks(self) -> Iterator[bytearray]:
        """The raw bytes, a few MiB at a time."""
        for first in range(0, self.nbytes, COPY_BYTES):
            yield self.read_bytes(first, min(first + COPY_BYTES, self.nbytes))

    def _fill(self, buffer: memoryview, offset: int) -> None:
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start + offset)
            _fill(file, buffer, self.path)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header as it stands on disk, and its tensors in the order of their bytes."""

    path: Path
    header: bytes
    metadata: dict[str, str]
    tensors: tuple[DiskTensor, ...]

    @property
    def nbytes(self) -> int:
        """Of the file, which its header accounts for."""
        return 8 + len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


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
        """What tells versions of a file apart: size and time of change, by which make and git know them."""
        found = {}
        for path in [*(shard.path.relative_to(self.directory) for shard in self.shards), *self.other_files]:
            facts = (self.directory / path).stat()
            found[str(path)] = f"{facts.st_size} bytes of time {facts.st_mtime_ns}"
        return found

    @cached_property
    def outgrows_cache(self) -> bool:
        """Larger than half of the memory: the system cannot keep it for whoever reads it next."""
        return sys.platform == "linux" and self.nbytes > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2

    @cached_property
    def other_files(self) -> tuple[Path, ...]:
        """Every file but the shards and dense copies in other formats, relative to the directory."""
        return tuple(path for path in self._rest if not is_other_format(path.as_posix()))

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
            if relative.parts[0] in NEVER_COPIED or str(relative) in shards or path.is_dir():
                continue
            check_contained(path, self.directory)
            if not path.is_file():
                raise InputRefused(f"{path} is not a regular file", "remove it from the checkpoint", code="unsafe-file")
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


def read_shard(path: Path) -> Shard:
    """Read and check the header of one safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
        if not 2 <= length <= min(MAX_JSON_BYTES, size - 8):
            raise InputRefused(
                f"{path} is not a whole safetensors file",
                "it is damaged or cut short: fetch it again",
                code="damaged-shard",
            )
        header = file.read(length)
    entries = parse_object(header, f"the header of {path}")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(_is_text, (*metadata, *metadata.values()))):
        raise InputRefused(
            f"the metadata of {path} is not text", "the file is damaged: fetch it again", code="damaged-shard"
        )
    data_start = 8 + length
    tensors = sorted((_entry(path, name, entry, data_start) for name, entry in entries.items()), key=_position)
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            raise InputRefused(
                f"{path}: tensors overlap or leave a hole before {tensor.name!r}",
                "fetch the file again",
                code="damaged-shard",
            )
        end = tensor.stop
    if end != size:
        state = "is cut short" if size < end else "has bytes after its last tensor"
        raise InputRefused(
            f"{path} {state}: {size:,} bytes, its header says {end:,}", "fetch it again", code="damaged-shard"
        )
    return Shard(path, header, metadata, tuple(tensors))


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
        pickles = sorted(
            path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(pattern)
        )
        why = f"has only pickled weights ({pickles[0]})" if pickles else "has no safetensors weights"
        raise InputRefused(
            f"{directory} {why}", "convert it with save_pretrained; tsenor never opens pickles", code="no-safetensors"
        )
    paths = [directory / name for name in names]
    for path in paths:
        if not path.is_file():
            raise InputRefused(
                f"{path} is missing", f"{INDEX_FILE} names it: fetch it again", code="inconsistent-checkpoint"
            )
        check_contained(path, directory)
    return paths


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


def _entry(path: Path, name: str, entry: object, data_start: int) -> DiskTensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)], **others} if (
            not others
            and name.isprintable()  # no real name has control characters, and a terminal might obey them
            and dtype in DTYPE_BITS
            and len(shape) <= 64
            and all(type(size) is int and size >= 0 for size in shape)
            and prod(size or 1 for size in shape) < 2**60  # its bits are counted in 64, whatever the order
            and 0 <= start <= stop
            and (stop - start) * 8 == prod(shape) * DTYPE_BITS[dtype]
        ):
            return DiskTensor(name, path, dtype, tuple(shape), data_start + start, data_start + stop)
    raise InputRefused(
        f"{path}: the entry of tensor {name!r} is not valid",
        "the file is damaged: fetch it again",
        code="damaged-shard",
    )


def _is_text(value: object) -> bool:
    """Half a surrogate pair, which JSON can spell, is not."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _position(tensor: DiskTensor) -> tuple[int, int]:
    return tensor.start, tensor.stop


def forget(file: IO[bytes], start: int, nbytes: int) -> None:
    """Let the system take what it keeps in memory of a file, where it can be told: nobody will read it again soon."""
    if sys.platform == "linux":
        os.posix_fadvise(file.fileno(), start, nbytes, os.POSIX_FADV_DONTNEED)


def _fill(file: Any, buffer: memoryview, path: Path) -> None:  # noqa: ANN401  (an unbuffered binary file)
    """Read exactly len(buffer) bytes: one read() may return fewer."""
    done = 0
    while done < len(buffer):
        try:
            count = file.readinto(buffer[done:])
        except OSError as error:  # reading does not name the file
            raise OSError(error.errno, error.strerror, str(path)) from error
        if not count:
            raise InputRefused(f"{path} became shorter while it was read", "keep the checkpoint still during the run")
        done += count
