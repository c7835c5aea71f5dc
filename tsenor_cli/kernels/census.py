"""Count what a mask keeps, fast, and knowing nothing of how masks are made."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tsenor_cli.kernels.compilation import compiled, compiling
from tsenor_cli.kernels.contract import Mask, Untyped
from tsenor_cli.kernels.threads import over_chunks

CHUNK_ENTRIES = 1 << 22  # a thread's helping: to wake one for less would take longer than the counting
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

    over_chunks(chunk, stripes, max(1, CHUNK_ENTRIES // (height * mask.shape[1])), (None, lambda: None))
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
        right, wrong = True, np.uint8(0)
        counts[:] = 0
        for row in range(stripe * height, (stripe + 1) * height):
            right &= _groups_are_right(words[row], n, words_per_group)
            if height > 1:
                entries = bytes_[row]
                for k in range(len(counts)):
                    counts[k] += entries[k]
        if height > 1:
            for k in range(len(counts)):
                wrong |= counts[k] ^ wanted
        verdicts[stripe] = right and wrong == 0


@compiled
def _groups_are_right(words: npt.NDArray[Any], n: int, per_group: int) -> bool:
    """Whether every group of one row sums to n; for the usual sizes a loop that the compiler vectorises."""
    if per_group == 1:
        wrong = _differences(words, n, 1)
    elif per_group == 2:
        wrong = _differences(words, n, 2)
    elif per_group == 4:
        wrong = _differences(words, n, 4)
    else:
        wrong = _differences(words, n, per_group)
    return bool(wrong == 0)


@compiled
def _differences(words: npt.NDArray[Any], n: int, per_group: int) -> int:
    """The bits in which the sums of groups differ from n; all of one type, for as many lanes as there can be.

    Multiplying by 0x01..01 sums the bytes of a word into the top one.
    """
    word, size = words.dtype.type, words.itemsize
    ones, shift, wanted = word(0x0101010101010101 >> (64 - 8 * size)), word(8 * (size - 1)), word(n)
    wrong = word(0)
    for group in range(len(words) // per_group):
        total = word(0)
        for k in range(per_group):
            total = word(total + words[group * per_group + k])
        wrong = word(wrong | (word(word(total * ones) >> shift) ^ wanted))
    return int(wrong)
