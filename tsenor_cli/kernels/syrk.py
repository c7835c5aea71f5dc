"""XᵀX of bfloat16 matrices (BLAS: syrk), where the processor multiplies them faster than float32 ones (bfloat16.py).

torch uses the same instructions, but rounds the sums to bfloat16. Here they are those of float32, as good as torch's of
float32 numbers (docs/decisions/0011).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tsenor_cli.kernels import bfloat16
from tsenor_cli.kernels.bfloat16 import COLUMNS, PANELS, TILE, Unit, add_pairs, multiply_tiles
from tsenor_cli.kernels.compilation import compiled, compiling
from tsenor_cli.kernels.contract import Untyped
from tsenor_cli.kernels.lanes import LANES, as_bits, as_float, as_float64, lanes, load, offset, pointer, spread, store
from tsenor_cli.kernels.threads import over_chunks
from tsenor_cli.kernels.transpose import take_columns

BFloat16s = npt.NDArray[np.uint16]
Words = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Range = tuple[int, int]

_AT_ONCE = 2048  # rows that are summed up in float32; what they come to is added in float64
_RUN = 64  # instructions that add to the same registers: Zen 4 cuts off what does not fit, always downwards
_ACROSS = PANELS * LANES


def takes(x: torch.Tensor) -> bool:
    """Whether `x` can be multiplied here: bfloat16, and faster than torch does it."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and bfloat16.unit() is not None


def add_products(x: BFloat16s, total: Doubles, ranges: Iterable[Range]) -> None:
    """Add XᵀX to `total` in some ranges of columns: all that is on and above the diagonal, and some of what is below.

    Args:
        x: [rows, features], bits of bfloat16, C-contiguous.
        total: [features, features], C-contiguous.
        ranges: of columns, each from a first one to before a last one. The cuts make no difference to the sums.
    """
    add = _kernels(_unit()).add

    def band(packed: _Packed, start: int, columns: Range, scratch: _Scratch) -> None:
        add(*packed, start, total, *columns, scratch)

    _over_bands([x], ranges, band)


def energies(matrices: Sequence[BFloat16s], gram: Doubles) -> list[float]:
    """Σ (XᵀX)_ij G_ij of every X [rows, features], bits of bfloat16, C-contiguous, all of one shape.

    G is symmetric [features, features]; its upper triangle alone is read, and once for all. The same for any number of
    threads.
    """
    dot, found = _kernels(_unit()).dot, [np.zeros(len(matrices))]

    def band(packed: _Packed, start: int, _: Range, scratch: _Scratch) -> None:
        found.append(np.zeros(len(matrices)))
        dot(*packed, start, gram, scratch, found[-1])

    _over_bands(matrices, [(0, len(gram))], band)
    return [math.fsum(parts) for parts in zip(*found, strict=True)]


class _Packed(NamedTuple):
    """Some rows of all matrices, as panels (bfloat16.py)."""

    panels: Words  # [matrices, panels, pairs, LANES]
    turned: Words | None  # the same with every tile transposed, for AMX


class _Scratch(NamedTuple):
    """What one thread writes to."""

    tile: Floats  # [COLUMNS, 96]: some products
    sums: Doubles  # [PANELS, LANES]


def _over_bands(
    matrices: Sequence[BFloat16s], ranges: Iterable[Range], work: Callable[[_Packed, int, Range, _Scratch], None]
) -> None:
    """Call work(packed, start, columns, scratch) for each band of columns that reaches into a range, longest first."""
    unit, pack = _unit(), _kernels(_unit()).pack
    bands = [(band * _ACROSS, columns) for columns in ranges for band in _bands(*columns)][::-1]
    count = PANELS * max((_bands(*columns).stop for _, columns in bands), default=0)
    for row in range(0, len(matrices[0]), _AT_ONCE):
        parts = [x[row : row + _AT_ONCE] for x in matrices]
        packed = _room(unit, len(parts), count, len(parts[0]))

        def fill(start: int, end: int, _: None, parts: list[BFloat16s] = parts, packed: _Packed = packed) -> None:
            for number, part in enumerate(parts):
                pack(part, *packed, number, start, end)

        def multiply(start: int, end: int, scratch: _Scratch, packed: _Packed = packed) -> None:
            for first, columns in bands[start:end]:
                work(packed, first, columns, scratch)

        over_chunks(fill, count, PANELS, (None, lambda: None))
        over_chunks(multiply, len(bands), 1, (("syrk", unit), lambda: _scratch(unit)))


def _unit() -> Unit:
    unit = bfloat16.unit()
    assert unit is not None, "takes() asks for it"
    return unit


def _bands(first: int, last: int) -> range:
    return range(first // _ACROSS, -(-last // _ACROSS))


def _room(unit: Unit, matrices: int, panels: int, rows: int) -> _Packed:
    pairs = -(-rows // 2) if unit == "avx512" else -(-rows // (2 * TILE)) * TILE  # whole tiles
    shape = matrices, panels, pairs, LANES
    plain, turned = (lanes(math.prod(shape[:-1]), np.int32).reshape(shape) for _ in range(2))
    return _Packed(plain, turned if unit == "amx" else None)


def _scratch(unit: Unit) -> _Scratch:
    return _Scratch(lanes(COLUMNS[unit] * PANELS, np.float32).reshape(-1, _ACROSS), lanes(PANELS, np.float64))


class _Kernels(NamedTuple):
    pack: Untyped
    add: Untyped
    dot: Untyped


@cache
def _kernels(unit: Unit) -> _Kernels:
    """All of them, compiled or loaded by calls that have nothing to do."""
    packed, scratch, nothing = _room(unit, 1, 0, 0), _scratch(unit), np.zeros((0, 0))
    with compiling():
        _pack(np.zeros((0, 0), np.uint16), *packed, 0, 0, 0)
        _add(*packed, 0, nothing, 0, 0, scratch)
        _dot(*packed, 0, nothing, scratch, np.zeros(1))
    return _Kernels(_pack, _add, _dot)


@compiled
def _pack(x: BFloat16s, panels: Words, turned: Words | None, number: int, start: int, end: int) -> None:
    """Panels `start` to `end` of matrix `number`, with zeros outside of it."""
    (rows, features), pairs, from_, to = x.shape, panels.shape[2], pointer(x), pointer(panels[number])
    lines = np.arange(0, TILE * LANES, LANES)
    for panel in range(start, end):
        column = panel * LANES
        for pair in range(pairs):
            if column + LANES <= features and 2 * pair + 1 < rows:
                place = 2 * pair * features + column
                low = as_bits(as_float(load(offset(from_, place), 0)), False)
                high = as_bits(as_float(load(offset(from_, place + features), 0)), False)
                low = (low >> spread(np.int32(16))) & spread(np.int32(0xFFFF))
                store(to, panel * pairs + pair, low | high)
            else:
                for t in range(LANES):
                    panels[number, panel, pair, t] = 0
                for row in range(2 * pair, min(2 * pair + 2, rows)):
                    for t in range(min(LANES, features - column)):
                        word = np.int32(x[row, column + t]) << np.int32(16 * (row % 2))
                        panels[number, panel, pair, t] |= word
        if turned is not None:
            for first in range(panel * pairs, (panel + 1) * pairs, TILE):
                take_columns(offset(to, first * LANES), pointer(lines), pointer(turned[number]), first, TILE)


@compiled
def _add(
    panels: Words, turned: Words | None, start: int, total: Doubles, first: int, last: int, scratch: _Scratch
) -> None:
    first, last, tile = max(first, start), min(last, start + _ACROSS), scratch.tile
    products = pointer(tile)
    for top in range(0, last, len(tile)):
        _multiply(panels, turned, 0, top, start, tile)
        for row in range(top, min(top + len(tile), len(total))):
            to = offset(pointer(total), row * len(total) + start)
            if last - first == _ACROSS:
                for t in range(PANELS):
                    store(to, t, load(to, t) + as_float64(load(products, (row - top) * PANELS + t)))
            else:
                for j in range(first - start, last - start):
                    to[j] += tile[row - top, j]


@compiled
def _dot(panels: Words, turned: Words | None, start: int, gram: Doubles, scratch: _Scratch, found: Doubles) -> None:
    last, tile = min(len(gram), start + _ACROSS), scratch.tile
    products, sums = pointer(tile), pointer(scratch.sums)
    for top in range(0, last, len(tile)):
        for number in range(len(panels)):
            _multiply(panels, turned, number, top, start, tile)
            scratch.sums[:] = 0
            for row in range(top, min(top + len(tile), last)):
                if row < start and start + _ACROSS <= len(gram):
                    numbers = offset(pointer(gram), row * len(gram) + start)
                    for t in range(PANELS):
                        factor = as_float64(load(products, (row - top) * PANELS + t))
                        store(sums, t, load(sums, t) + factor * load(numbers, t))
                else:
                    for j in range(max(row, start), last):
                        found[number] += gram[row, j] * tile[row - top, j - start] * (1 if row == j else 2)
            found[number] += 2 * scratch.sums.sum()


@compiled
def _multiply(panels: Words, turned: Words | None, number: int, top: int, start: int, tile: Floats) -> None:
    """The products of matrix `number` whose first row is `top` and whose first column is `start`."""
    pairs, words, to = panels.shape[2], pointer(panels[number]), pointer(tile)
    across = offset(words, start * pairs)
    if turned is None:
        tile[:] = 0
        down = offset(words, top // LANES * pairs * LANES + top % LANES)
        for pair in range(0, pairs, _RUN):
            add_pairs(down, across, pair, min(pair + _RUN, pairs), pairs, to)
    else:
        multiply_tiles(offset(pointer(turned[number]), top * pairs), across, pairs, to)
