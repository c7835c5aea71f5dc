"""One pass over weights as they lie in memory: set to zero what a mask drops, and sum up squares."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tsenor_cli.kernels.compilation import compiled, compiling
from tsenor_cli.kernels.contract import Mask, Untyped
from tsenor_cli.kernels.threads import CHUNK_SCORES, over_chunks

Bits = npt.NDArray[np.unsignedinteger[Any]]


def keep_bits(bits: Bits, mask: Mask, kept: Bits) -> None:
    """`kept` = `bits` where `mask` is true, else 0; minus zero becomes 0. All of one size, 16 to 64 bits."""
    minus_zero = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    keep = _compile_keep(bits.dtype)
    flat, flat_mask, target = bits.reshape(-1), mask.view(np.uint8).reshape(-1), kept.reshape(-1)

    def chunk(first: int, last: int, _: None) -> None:
        keep(flat[first:last], flat_mask[first:last], minus_zero, target[first:last])

    over_chunks(chunk, bits.size, CHUNK_SCORES, (None, lambda: None))


def zeros(bits: Bits) -> int:
    """How many of these are 0: 16 to 64 bits."""
    flat, count = bits.reshape(-1), _compile_count(bits.dtype)
    counts = np.zeros(-(-flat.size // CHUNK_SCORES), np.int64)

    def chunk(first: int, last: int, _: None) -> None:
        counts[first // CHUNK_SCORES] = count(flat[first:last])

    over_chunks(chunk, flat.size, CHUNK_SCORES, (None, lambda: None))
    return int(counts.sum())


def squares(weight: npt.NDArray[Any]) -> float:
    """Σ w² in float64 of weight [rows, cols]: float32, or bfloat16 as uint16. The same for any number of threads."""
    rows, cols = weight.shape
    size = max(1, CHUNK_SCORES // max(cols, 1))
    sums = np.zeros(-(-rows // size))
    add_squares = _compile_squares(weight.dtype)

    def chunk(first: int, last: int, by_column: npt.NDArray[np.float64]) -> None:
        add_squares(weight, first, last, by_column)
        sums[first // size] = by_column.sum()

    over_chunks(chunk, rows, size, (("squares", cols), lambda: np.empty(cols)))
    return math.fsum(sums)


@cache
def _compile_keep(dtype: np.dtype[Any]) -> Untyped:
    with compiling():
        _keep(np.empty(0, dtype), np.empty(0, np.uint8), dtype.type(0), np.empty(0, dtype))
    return _keep


@cache
def _compile_count(dtype: np.dtype[Any]) -> Untyped:
    with compiling():
        _count(np.empty(0, dtype))
    return _count


@cache
def _compile_squares(dtype: np.dtype[Any]) -> Untyped:
    with compiling():
        _add_squares(np.empty((0, 0), dtype), 0, 0, np.empty(0))
    return _add_squares


@compiled
def _keep(bits: Bits, mask: Mask, minus_zero: np.unsignedinteger[Any], kept: Bits) -> None:
    zero = minus_zero ^ minus_zero
    for k in range(len(bits)):
        found = bits[k] * mask[k]
        kept[k] = found if found != minus_zero else zero


@compiled
def _count(bits: Bits) -> int:
    found, zero = 0, bits.dtype.type(0)
    for k in range(len(bits)):
        found += bits[k] == zero
    return found


@compiled
def _add_squares(weight: npt.NDArray[Any], first: int, last: int, by_column: npt.NDArray[np.float64]) -> None:
    """Columns are summed side by side, which the compiler can vectorise without changing the order of any sum."""
    by_column[:] = 0.0
    for row in range(first, last):
        weights = weight[row]
        for k in range(len(weights)):
            x = _as_float64(weights[k])
            by_column[k] += x * x


@compiled
def _as_float64(value: Untyped) -> float:
    if isinstance(value, np.uint16):
        return np.float64(np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32))
    return np.float64(value)
