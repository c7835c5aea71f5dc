"""Reading past the system's cache, which has no room for a large checkpoint: a tenth of the system's work on it.

What others have in the cache stays there (docs/measured.md; open(2), O_DIRECT).
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

_BLOCK = 4096  # places in files and in memory are multiples of a disk's blocks; none has larger ones
_ALIGNMENT = 8  # of tensors, as safetensors writes them


def read_uncached(path: Path, start: int, nbytes: int) -> memoryview | None:
    """Some bytes of a file, or None where this cannot be: reading them the plain way then says what is wrong, if it is.

    The memory is aligned as the file is, so that it can be viewed as numbers; files whose tensors lie at odd places are
    left to the plain way.
    """
    if sys.platform != "linux" or start % _ALIGNMENT:
        return None
    first = start - start % _BLOCK
    room, done, wanted = _aligned(start + nbytes - first), 0, start + nbytes - first
    with suppress(OSError), os.fdopen(os.open(path, os.O_RDONLY | os.O_DIRECT), "rb", buffering=0) as file:
        while done < wanted and (count := os.preadv(file.fileno(), [room[done:]], first + done)):
            done += count
    return room[start - first : wanted] if done >= wanted else None


def _aligned(nbytes: int) -> memoryview:
    """Room for at least so many bytes, in whole blocks."""
    length = -(-nbytes // _BLOCK) * _BLOCK
    room = np.empty(length + _BLOCK, dtype=np.uint8)
    first = -room.ctypes.data % _BLOCK
    return room[first : first + length].data
