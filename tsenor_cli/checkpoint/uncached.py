"""Reading past the system's cache, which has no room for a large checkpoint: a tenth of the system's work on it.

What is in the cache is read from there, and what others have in it stays (docs/measured.md; open(2), O_DIRECT).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

_BLOCK = 4096  # places in files and in memory are multiples of a disk's blocks; none has larger ones
_ALIGNMENT = 8  # of tensors, as safetensors writes them


def read_uncached(path: Path, start: int, nbytes: int) -> memoryview | None:
    """Some bytes of a file, or None where the plain way is better, or says what is wrong.

    The memory is aligned as the file is, so that it can be viewed as numbers; files whose tensors lie at odd places are
    left to the plain way, and so is what is in the cache.
    """
    if sys.platform != "linux" or start % _ALIGNMENT:
        return None
    first = start - start % _BLOCK
    room, done, wanted = _aligned(start + nbytes - first), 0, start + nbytes - first
    with suppress(OSError, ValueError), os.fdopen(os.open(path, os.O_RDONLY | os.O_DIRECT), "rb", buffering=0) as file:
        if os.access(path, os.W_OK) and _is_cached(file.fileno(), first, wanted):
            return None
        while done < wanted and (count := os.preadv(file.fileno(), [room[done:]], first + done)):
            done += count
    return room[start - first : wanted] if done >= wanted else None


def _is_cached(file: int, start: int, nbytes: int) -> bool:
    """Whether all of these bytes are in the system's cache; always, of a file that we may not write (mincore(2)).

    To try to read them would not do: the system begins to fetch what is not there (preadv2(2), RWF_NOWAIT).
    """
    before = start % mmap.ALLOCATIONGRANULARITY
    pages = np.zeros(-(-(before + nbytes) // mmap.PAGESIZE), dtype=np.uint8)
    with mmap.mmap(file, before + nbytes, access=mmap.ACCESS_READ, offset=start - before) as mapped:
        there = np.frombuffer(mapped, dtype=np.uint8)
        asked = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(there.ctypes.data), ctypes.c_size_t(there.nbytes), ctypes.c_void_p(pages.ctypes.data)
        )
        del there  # else it could not be unmapped
    return asked == 0 and bool((pages & 1).all())


def _aligned(nbytes: int) -> memoryview:
    """Room for at least so many bytes, in whole blocks."""
    length = -(-nbytes // _BLOCK) * _BLOCK
    room = np.empty(length + _BLOCK, dtype=np.uint8)
    first = -room.ctypes.data % _BLOCK
    return room[first : first + length].data
