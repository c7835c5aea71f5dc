"""One safetensors file: its header is read and checked, the bytes of its tensors are read on demand.

Nothing is memory-mapped: mapped pages would stay resident, and a file that shrinks under a map kills the process.
The format: an 8-byte little-endian header length, a JSON header, then the tensors' bytes without holes
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsenor_cli.checkpoint.jsonfile import MAX_JSON_BYTES, parse_object
from tsenor_cli.checkpoint.uncached import read_uncached
from tsenor_cli.errors import InputRefused

if TYPE_CHECKING:
    import torch

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


@dataclass(frozen=True)
class DiskTensor:
    """One tensor in one shard. `start` and `stop` are byte positions in the file."""

    name: str
    path: Path
    dtype: str  # as safetensors spells it: BF16, F32, …
    shape: tuple[int, ...]
    start: int
    stop: int
    uncached: bool = False  # read past the system's cache

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
        nbytes = count * row_bytes
        there = None if pinned else self._read_uncached(first * row_bytes, nbytes)
        if there is None:
            raw = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
            self._fill(raw.numpy().data, first * row_bytes)
        else:
            raw = torch.frombuffer(there, dtype=torch.uint8)
        return raw.view(dtype).view((count, *others) if self.shape else ())

    def read_bytes(self, first: int, last: int) -> bytearray | memoryview:
        """Bytes `first` to `last` of the tensor, whatever its dtype."""
        there = self._read_uncached(first, last - first)
        if there is not None:
            return there
        buffer = bytearray(last - first)
        self._fill(memoryview(buffer), first)
        return buffer

    def chunks(self) -> Iterator[bytearray | memoryview]:
        """The raw bytes, a few MiB at a time."""
        return (self.read_bytes(*piece) for piece in self.pieces())

    def pieces(self) -> list[tuple[int, int]]:
        """Where its bytes are cut into a few MiB each."""
        return [(first, min(first + COPY_BYTES, self.nbytes)) for first in range(0, self.nbytes, COPY_BYTES)]

    def _read_uncached(self, offset: int, nbytes: int) -> memoryview | None:
        return read_uncached(self.path, self.start + offset, nbytes) if self.uncached and nbytes else None

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

    def uncached(self) -> Shard:
        """To be read past the system's cache."""
        return replace(self, tensors=tuple(replace(tensor, uncached=True) for tensor in self.tensors))


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
