"""Count what a mask keeps, fast, and knowing nothing of how masks are made."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tsenor_cli.kernels.compilation import compiled, compiling
from tsenor_cli.kernels.contract import Mask, Untyped
from tsenor_cli.kernels.threads import CHUNK_SCORES, over_chunks

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def stripes_are_right(mask: Mask, n: int, m: int, height: int) -> bool:
    """Whether every m consecutive entries of a row keep n and, if height > 1, every column of every stripe keeps n.

    mask [rows, cols] is C-contiguous; m divides cols. A stripe is `height` rows, and height divides rows.
    """
    if mask.size == 0:
        return True
    size = math.gcd(m, 8)
    bytes_ = mask.view(np.uint8)
    words = bytes_.view(_WORDS[size])  # a group is m / size words, counted bytewise, then summed by one product
    stripes = len(mask) // height
    verdicts = np.zeros(stripes, np.bool_)
    census = _compile(words.dtype)

    def chunk(first: int, last: int, _: None) -> None:
        census(bytes_, words, n, m // size, height, first, last, verdicts)

    over_chunks(chunk, stripes, max(1, CHUNK_SCORES // (height * mask.shape[1])), (None, lambda: None))
    return bool(verdicts.all())


@cache
def _compile(word: np.dtype[Any]) -> Untyped:
    with compiling():
        _census(np.empty((0, 0), np.uint8), np.empty((0, 0), word), 1, 1, 1, 0, 0, np.empty(0, np.bool_))
    return _census


@compiled
def _census(
    bytes_: npt.NDArray[np.uint8],
    words: npt.NDArray[Any],
    n: int,
    words_per_group: int,
    height: int,
    first: int,
    last: int,
    verdicts: npt.NDArray[np.bool_],
) -> None:
    """Judge stripes first .. last-1."""
    counts, wanted = np.zeros(bytes_.shape[1], np.uint8), np.uint8(n)
    for stripe in range(first, last):
        wrong = 0
        counts[:] = 0
        for row in range(stripe * height, (stripe + 1) * height):
            wrong += _wrong_groups(words[row], words_per_group, wanted)
            if height > 1:
                entries = bytes_[row]
                for k in range(len(counts)):
                    counts[k] += entries[k]
        if height > 1:
            for k in range(len(counts)):
                wrong += counts[k] != wanted
        verdicts[stripe] = wrong == 0


@compiled
def _wrong_groups(words: npt.NDArray[Any], per_group: int, wanted: np.uint8) -> int:
    """How many groups of one row do not sum to `wanted`. Multiplying by 0x01..01 sums the bytes into the top one."""
    size, wrong, zero = words.itemsize, 0, words.dtype.type(0)
    ones, shift = words.dtype.type(0x0101010101010101 >> (64 - 8 * size)), words.dtype.type(8 * (size - 1))
    if per_group == 1:  # the common patterns; a loop that the compiler vectorises
        for k in range(len(words)):
            wrong += np.uint8((words[k] * ones) >> shift) != wanted
        return wrong
    for group in range(len(words) // per_group):
        total = zero
        for k in range(per_group):
            total += words[group * per_group + k]
        wrong += np.uint8((total * ones) >> shift) != wanted
    return wrong
