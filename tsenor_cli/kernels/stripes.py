"""The columns of a stripe in the sweep of SparseGPT (pruners/sparsegpt.py), LANES outputs side by side on a CPU.

Columns are short work for a library of matrices: its calls would cost more than what they do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tsenor_cli.kernels.compilation import compiled, compiling
from tsenor_cli.kernels.contract import Mask, Pointer, Untyped, UnusableScoresError
from tsenor_cli.kernels.lanes import (
    LANES,
    as_bits,
    from_bits,
    from_mask,
    lanes,
    larger,
    load,
    offset,
    pointer,
    spread,
    store,
    sum_of,
    where,
)
from tsenor_cli.kernels.standard import rank_lanes
from tsenor_cli.kernels.threads import over_chunks

Floats = npt.NDArray[np.floating[Any]]

_CHUNK = 1 << 20  # products that a thread does at a time
_MOVED = 32  # products take as long as to move one number from rows into lanes, or back
_TOGETHER = 4  # columns that read the changes before them together


class Rounding(NamedTuple):
    """How to round float32 or float64 numbers to a format of fewer bits, to nearest, ties to even.

    To drop the last bits of a number, half of the last kept one is added, a bit less if that is even. Numbers below
    `tiny` have a fixed last place in the format: that of numbers near `grid` in the wider one.
    """

    words: npt.NDArray[np.signedinteger[Any]]  # [4]: how many bits go; 1; half of the last kept one less 1; those kept
    floats: Floats  # [2]: tiny, grid


def rounding(narrow: torch.finfo, wide: torch.finfo) -> Rounding:
    """That of numbers in `wide`, float32 or float64, to `narrow`, which may be the same."""
    words, floats = np.dtype(f"i{wide.bits // 8}"), np.dtype(f"f{wide.bits // 8}")
    gone = round(math.log2(narrow.eps / wide.eps))
    drop = [gone, 1, (1 << (gone - 1)) - 1, -1 << gone] if gone else [0, 0, 0, -1]
    fixed = [narrow.tiny, 1.5 * narrow.tiny * 2.0**gone] if narrow.tiny > wide.tiny else [0.0, 0.0]
    return Rounding(np.array(drop, words), np.array(fixed, floats))


class Block(NamedTuple):
    """Some columns of a weight on their way, outputs in groups of LANES. All but `kept` of one dtype, float32 or 64."""

    values: Floats  # [groups, columns, LANES]: up to date from the blocks before; final, once a stripe is finished
    change: Floats  # [groups, columns, LANES]: the original weight; less the final one, once a stripe is finished
    kept: npt.NDArray[np.uint8]  # [groups, columns, LANES]: what the finished stripes keep
    squares: Floats  # [groups, 2, LANES]: Σ over the finished columns of errors² (E of algorithm 1) and of changes²
    pull: Floats  # [columns, columns]: how much of the change of a column (2nd) has to be added to one after it (1st)
    local: Floats  # [columns / m, m, m]: R_ss⁻¹ of every stripe, upper triangular


def open_block(weight: Floats, start: int, updates: Floats, pull: Floats, local: Floats) -> Block:
    """Begin with a block of columns.

    Args:
        weight: [outputs, inputs], contiguous.
        start: the first column of the block.
        updates: [columns, outputs], contiguous: what the blocks before this one ask for.
        pull: see Block; contiguous.
        local: see Block; contiguous.
    """
    (columns, outputs), dtype = updates.shape, weight.dtype
    shape = (-(-outputs // LANES), columns, LANES)
    values, change, kept = np.empty(shape, dtype), np.empty(shape, dtype), np.empty(shape, np.uint8)
    block = Block(values, change, kept, np.zeros((shape[0], 2, LANES), dtype), pull, local)
    gather = _compile(dtype).gather
    _over_groups(block, columns * _MOVED, lambda first, last, _: gather(block, first, last, weight, start, updates))
    return block


def bring_up_to_date(block: Block, first: int, scores: Floats) -> None:
    """Add to the m columns of a stripe what the changes before them in the block ask for, and score them.

    Args:
        block: changed in place.
        first: column of the stripe in the block.
        scores: [outputs, m], filled with (w_j / U_jj)².
    """
    update, m = _compile(block.values.dtype).update, scores.shape[1]
    _over_groups(block, m * (first + m), lambda start, end, _: update(block, first, m, start, end, scores))


def finish(block: Block, first: int, mask: Mask, rounded: Rounding) -> None:
    """Give the columns of a stripe their last values, one after the other: rounded, and zero where the mask drops them.

    They are rounded here, not at the end, so that later columns make up for the rounding as well.

    Args:
        block: changed in place.
        first: column of the stripe in the block.
        mask: bool [outputs, m], contiguous.
        rounded: how.
    """
    settle, m = _compile(block.values.dtype).finish, mask.shape[1]

    def chunk(start: int, end: int, scratch: _Scratch) -> None:
        settle(block, first, m, start, end, mask.view(np.uint8), rounded, scratch)

    _over_groups(block, m * m, chunk, m)


def finish_all(block: Block, n: int, m: int, outputs: int, rounded: Rounding) -> float:
    """All of the above for every stripe, where each keeps the n best of its m columns in every row.

    Returns:
        Σ of the scores that are kept.

    Raises:
        UnusableScoresError: a value has left the range of the dtype.
    """
    select, columns = _compile(block.values.dtype).select, block.values.shape[1]
    kept: list[float] = []

    def chunk(start: int, end: int, scratch: _Scratch) -> None:
        found = select(block, n, m, start, end, outputs, rounded, scratch)
        if found < 0:
            raise UnusableScoresError
        kept.append(found)

    _over_groups(block, columns * columns, chunk, m)
    return math.fsum(kept)


def close_block(block: Block, start: int, weight: Floats, change: Floats, mask: Mask) -> tuple[float, float]:
    """Write down what has become of a block.

    Args:
        block: all of its stripes are finished.
        start: its first column.
        weight: [outputs, inputs], contiguous: receives the last values in its columns.
        change: [columns, outputs], contiguous: receives the original ones less these.
        mask: bool [outputs, inputs], contiguous.

    Returns:
        Σ of errors² and of changes².
    """
    scatter = _compile(weight.dtype).scatter

    def chunk(first: int, last: int, _: None) -> None:
        scatter(block, first, last, weight, start, change, mask.view(np.uint8))

    _over_groups(block, len(change) * _MOVED, chunk)
    lost, moved = block.squares.sum((0, 2), dtype=np.float64).tolist()
    return lost, moved


class _Scratch(NamedTuple):
    """What one thread writes to."""

    scores: Floats  # [m, LANES]
    errors: Floats  # [m, LANES]


def _over_groups(block: Block, work: int, chunk: Callable[[int, int, Any], None], m: int | None = None) -> None:
    """Call `chunk` for all groups; `work` is how many products there are to an output. With scratch for m columns."""
    dtype = block.values.dtype
    scratch = (("stripes", dtype, m), lambda: _scratch(m, dtype)) if m else (None, lambda: None)
    over_chunks(chunk, len(block.values), max(1, _CHUNK // (LANES * work)), scratch)


def _scratch(m: int, dtype: np.dtype[Any]) -> _Scratch:
    return _Scratch(lanes(m, dtype), lanes(m, dtype))


class _Kernels(NamedTuple):
    gather: Untyped
    update: Untyped
    finish: Untyped
    select: Untyped
    scatter: Untyped


@cache
def _compile(dtype: np.dtype[Any]) -> _Kernels:
    """All of them for this dtype, compiled or loaded by calls that have nothing to do."""
    grouped, same = np.zeros((0, 0, LANES), dtype), torch.finfo(getattr(torch, dtype.name))
    plain, mask = np.zeros((0, 0), dtype), np.zeros((0, 0), np.uint8)
    rounded, scratch = rounding(same, same), _scratch(1, dtype)
    block = Block(grouped, grouped, grouped.astype(np.uint8), grouped, plain, np.zeros((0, 1, 1), dtype))
    with compiling():
        _gather(block, 0, 0, plain, 0, plain)
        _update(block, 0, 1, 0, 0, plain)
        _finish(block, 0, 1, 0, 0, mask, rounded, scratch)
        _select(block, 1, 1, 0, 0, 0, rounded, scratch)
        _scatter(block, 0, 0, plain, 0, plain, mask)
    return _Kernels(_gather, _update, _finish, _select, _scatter)


@compiled
def _gather(block: Block, start: int, end: int, weight: Floats, column: int, updates: Floats) -> None:
    for group in range(start, end):
        first, used = group * LANES, min(LANES, len(weight) - group * LANES)
        for j in range(block.values.shape[1]):
            for t in range(LANES):
                x = weight[first + t, column + j] if t < used else 0
                block.change[group, j, t] = x
                block.values[group, j, t] = x + updates[j, first + t] if t < used else 0


@compiled
def _scatter(block: Block, start: int, end: int, weight: Floats, column: int, change: Floats, mask: Mask) -> None:
    for group in range(start, end):
        first, used = group * LANES, min(LANES, len(weight) - group * LANES)
        for j in range(block.values.shape[1]):
            for t in range(used):
                change[j, first + t] = block.change[group, j, t]
        for t in range(used):
            for j in range(block.values.shape[1]):
                weight[first + t, column + j] = block.values[group, j, t]
                mask[first + t, column + j] = block.kept[group, j, t]


@compiled
def _update(block: Block, first: int, m: int, start: int, end: int, scores: Floats) -> None:
    columns, local, pull = block.values.shape[1], block.local[first // m], pointer(block.pull)
    for group in range(start, end):
        here = offset(pointer(block.values), group * columns * LANES)
        _update_lanes(here, offset(pointer(block.change), group * columns * LANES), pull, columns, first, m)
        for t in range(min(LANES, len(scores) - group * LANES)):
            for j in range(m):
                score = block.values[group, first + j, t] / local[j, j]
                scores[group * LANES + t, j] = score * score


@compiled
def _finish(
    block: Block, first: int, m: int, start: int, end: int, mask: Mask, rounded: Rounding, scratch: _Scratch
) -> None:
    words, floats = pointer(rounded.words), pointer(rounded.floats)
    columns, local, errors = block.values.shape[1], pointer(block.local[first // m]), pointer(scratch.errors)
    for group in range(start, end):
        for t in range(min(LANES, len(mask) - group * LANES)):
            for j in range(m):
                block.kept[group, first + j, t] = mask[group * LANES + t, j]
        place = (group * columns + first) * LANES
        here, moved = offset(pointer(block.values), place), offset(pointer(block.change), place)
        squares = offset(pointer(block.squares), group * 2 * LANES)
        _finish_lanes(here, moved, offset(pointer(block.kept), place), squares, local, m, words, floats, errors)


@compiled
def _select(
    block: Block, n: int, m: int, start: int, end: int, outputs: int, rounded: Rounding, scratch: _Scratch
) -> float:
    """Returns Σ of the kept scores, or -1 if one is unusable."""
    words, floats = pointer(rounded.words), pointer(rounded.floats)
    scores, errors = pointer(scratch.scores), pointer(scratch.errors)
    columns, pull, total = block.values.shape[1], pointer(block.pull), spread(0.0)
    for group in range(start, end):
        used = from_mask((1 << min(LANES, outputs - group * LANES)) - 1)
        values = offset(pointer(block.values), group * columns * LANES)
        change = offset(pointer(block.change), group * columns * LANES)
        squares = offset(pointer(block.squares), group * 2 * LANES)
        for first in range(0, columns, m):
            local = offset(pointer(block.local), first * m)
            kept = offset(pointer(block.kept), (group * columns + first) * LANES)
            here, moved = offset(values, first * LANES), offset(change, first * LANES)
            _update_lanes(values, change, pull, columns, first, m)
            for j in range(m):
                score = load(here, j) / spread(local[j * m + j])
                store(scores, j, score * score)
            best, sound = rank_lanes(scores, False, n, m, kept)
            if not sound:
                return -1.0
            total = total + where(used, best, spread(0.0))
            _finish_lanes(here, moved, kept, squares, local, m, words, floats, errors)
    return float(sum_of(total))


@compiled
def _update_lanes(values: Pointer, change: Pointer, pull: Pointer, columns: int, first: int, m: int) -> None:
    """Bring the m columns from `first` on up to date: LANES outputs, values and change [columns, LANES]."""
    last = first + m
    for j in range(first, last - _TOGETHER + 1, _TOGETHER):
        a, b, c, d = load(values, j), load(values, j + 1), load(values, j + 2), load(values, j + 3)
        row = offset(pull, j * columns)
        for k in range(first):
            x = load(change, k)
            a = a + x * spread(row[k])
            b = b + x * spread(row[columns + k])
            c = c + x * spread(row[2 * columns + k])
            d = d + x * spread(row[3 * columns + k])
        store(values, j, a)
        store(values, j + 1, b)
        store(values, j + 2, c)
        store(values, j + 3, d)
    for j in range(last - m % _TOGETHER, last):
        a = load(values, j)
        for k in range(first):
            a = a + load(change, k) * spread(pull[j * columns + k])
        store(values, j, a)


@compiled
def _finish_lanes(
    values: Pointer,
    change: Pointer,
    kept: Pointer,
    squares: Pointer,
    local: Pointer,
    m: int,
    words: Pointer,
    floats: Pointer,
    errors: Pointer,
) -> None:
    """The m columns of a stripe, all [m, LANES], one after the other; `local` [m, m]. See Rounding for the rest."""
    lost, moved, zero = load(squares, 0), load(squares, 1), spread(floats[0] - floats[0])
    for j in range(m):
        x = load(values, j)
        for k in range(j):
            x = x - load(errors, k) * spread(local[k * m + j])
        last = where(load(kept, j) != spread(np.uint8(0)), _rounded(x, words, floats), zero) + zero  # no -0.0
        error, difference = (x - last) / spread(local[j * m + j]), load(change, j) - last
        lost, moved = lost + error * error, moved + difference * difference
        store(errors, j, error)
        store(values, j, last)
        store(change, j, difference)
    store(squares, 0, lost)
    store(squares, 1, moved)


@compiled
def _rounded(x: Untyped, words: Pointer, floats: Pointer) -> Untyped:
    """See Rounding."""
    bits = as_bits(x, False)
    half = spread(words[2]) + ((bits >> spread(words[0])) & spread(words[1]))
    tiny, grid = spread(floats[0]), spread(floats[1])
    size, fine = larger(x, (grid - grid) - x), (x + grid) - grid
    return where(tiny > size, fine, from_bits((bits + half) & spread(words[3]), x))
