"""The columns of a stripe in the sweep of SparseGPT (pruners/sparsegpt.py), LANES outputs side by side on a CPU.

Columns are short work for a library of matrices: its calls would cost more than what they do.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tsenor_cli.kernels.compilation import compiled, compiling
from tsenor_cli.kernels.contract import Mask, Untyped
from tsenor_cli.kernels.lanes import (
    LANES,
    as_bits,
    from_bits,
    from_mask,
    lanes,
    larger,
    load,
    pointer,
    spread,
    store,
    where,
)
from tsenor_cli.kernels.threads import over_chunks

Floats = npt.NDArray[np.floating[Any]]

_CHUNK = 1 << 20  # products that a thread does at a time
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
    """Some columns of a weight on their way, outputs in groups of LANES. All of one dtype, float32 or float64."""

    values: Floats  # [groups, columns, LANES]: up to date from the blocks before; final, once a stripe is finished
    change: Floats  # [groups, columns, LANES]: the original weight; less the final one, once a stripe is finished
    pull: Floats  # [columns, columns]: how much of the change of a column (2nd) has to be added to one after it (1st)
    local: Floats  # [columns / m, m, m]: R_ss⁻¹ of every stripe, upper triangular


def bring_up_to_date(block: Block, first: int, m: int, scores: Floats) -> None:
    """Add to the m columns of a stripe what the changes before them in the block ask for, and score them.

    Args:
        block: changed in place.
        first: column of the stripe in the block.
        m: its columns.
        scores: [outputs, m], filled with (w_j / U_jj)².
    """
    update = _compile(block.values.dtype).update

    def chunk(start: int, end: int, _: None) -> None:
        update(block, first, m, start, end, scores)

    over_chunks(chunk, len(block.values), max(1, _CHUNK // (LANES * m * (first + m))), (None, lambda: None))


def finish(block: Block, first: int, m: int, mask: Mask, rounded: Rounding, joined: Mask) -> None:
    """Give the columns of a stripe their last values, one after the other: rounded, and zero where the mask drops them.

    They are rounded here, not at the end, so that later columns make up for the rounding as well.

    Args:
        block: changed in place.
        first: column of the stripe in the block.
        m: its columns.
        mask: bool [outputs, m], contiguous.
        rounded: how.
        joined: bool [outputs, columns], contiguous: receives `mask`.
    """
    settle, dtype = _compile(block.values.dtype).finish, block.values.dtype

    def chunk(start: int, end: int, errors: Floats) -> None:
        settle(block, first, m, start, end, mask, rounded, joined, errors)

    size = max(1, _CHUNK // (LANES * m * m))
    over_chunks(chunk, len(block.values), size, (("stripes", dtype, m), lambda: lanes(m, dtype)))


class _Kernels(NamedTuple):
    update: Untyped
    finish: Untyped


@cache
def _compile(dtype: np.dtype[Any]) -> _Kernels:
    """Both for this dtype, compiled or loaded by a call that has nothing to do."""
    grouped, same = np.zeros((0, 0, LANES), dtype), torch.finfo(getattr(torch, dtype.name))
    block = Block(grouped, grouped, np.zeros((0, 0), dtype), np.zeros((0, 1, 1), dtype))
    mask = np.zeros((0, 1), np.bool_)
    with compiling():
        _update(block, 0, 1, 0, 0, np.zeros((0, 1), dtype))
        _finish(block, 0, 1, 0, 0, mask, rounding(same, same), mask, lanes(1, dtype))
    return _Kernels(_update, _finish)


@compiled
def _update(block: Block, first: int, m: int, start: int, end: int, scores: Floats) -> None:
    columns, stripe, pull = block.values.shape[1], first // m, block.pull
    here, moved = pointer(block.values), pointer(block.change)
    for group in range(start, end):
        base, last = group * columns, first + m
        for j in range(first, last - _TOGETHER + 1, _TOGETHER):
            a, b = load(here, base + j), load(here, base + j + 1)
            c, d = load(here, base + j + 2), load(here, base + j + 3)
            for k in range(first):
                x = load(moved, base + k)
                a = a + x * spread(pull[j, k])
                b = b + x * spread(pull[j + 1, k])
                c = c + x * spread(pull[j + 2, k])
                d = d + x * spread(pull[j + 3, k])
            store(here, base + j, a)
            store(here, base + j + 1, b)
            store(here, base + j + 2, c)
            store(here, base + j + 3, d)
        for j in range(last - m % _TOGETHER, last):
            a = load(here, base + j)
            for k in range(first):
                a = a + load(moved, base + k) * spread(pull[j, k])
            store(here, base + j, a)
        for t in range(min(LANES, len(scores) - group * LANES)):
            for j in range(m):
                score = block.values[group, first + j, t] / block.local[stripe, j, j]
                scores[group * LANES + t, j] = score * score


@compiled
def _finish(
    block: Block,
    first: int,
    m: int,
    start: int,
    end: int,
    mask: Mask,
    rounded: Rounding,
    joined: Mask,
    errors: Floats,
) -> None:
    columns, local = block.values.shape[1], block.local[first // m]
    here, moved, lost = pointer(block.values), pointer(block.change), pointer(errors)
    zero = errors.dtype.type(0)
    for group in range(start, end):
        base, used = group * columns + first, min(LANES, len(mask) - group * LANES)
        for j in range(m):
            x = load(here, base + j)
            for k in range(j):
                x = x - load(lost, k) * spread(local[k, j])
            kept = 0
            for t in range(used):
                keeps = mask[group * LANES + t, j]
                joined[group * LANES + t, first + j] = keeps
                kept |= int(keeps) << t
            last = where(from_mask(kept), _rounded(x, rounded), spread(zero))
            store(lost, j, (x - last) / spread(local[j, j]))
            store(here, base + j, last)
            store(moved, base + j, load(moved, base + j) - last)


@compiled
def _rounded(x: Untyped, to: Rounding) -> Untyped:
    """See Rounding."""
    bits = as_bits(x, False)
    half = spread(to.words[2]) + ((bits >> spread(to.words[0])) & spread(to.words[1]))
    tiny, grid = spread(to.floats[0]), spread(to.floats[1])
    size, fine = larger(x, (grid - grid) - x), (x + grid) - grid
    return where(tiny > size, fine, from_bits((bits + half) & spread(to.words[3]), x))
