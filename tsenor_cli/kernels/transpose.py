"""Tiles in memory ↔ blocks in lanes: the shuffles that turn LANES short runs of numbers into columns, and back.

A stage takes the vectors of a sequence in pairs and puts its even places before its odd ones. log2(width) stages bring
every width-th number together, the columns in bit-reversed order (the perfect shuffle; Stone 1971).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from tsenor_cli.kernels.contract import Untyped
from tsenor_cli.kernels.lanes import LANES, intrinsic

_EVEN = list(range(0, 2 * LANES, 2))
_ODD = list(range(1, 2 * LANES, 2))
_LOW = [place for k in range(LANES // 2) for place in (k, LANES + k)]
_HIGH = [place + LANES // 2 for place in _LOW]


@intrinsic
def take_columns(
    _typing: Untyped, source: Untyped, places: Untyped, target: Untyped, row: Untyped, width: Untyped
) -> Untyped:
    """target[(row + c) * LANES + t] = source[places[t] + c] for c < width, t < LANES; width is a literal 2^x ≤ 16."""
    if not isinstance(width, types.IntegerLiteral):
        return None  # numba asks with the plain types first
    count = width.literal_value

    def emit(context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        starts = _runs(builder, args[0], args[1], count)
        runs = [builder.load(start, align=source.dtype.bitwidth // 8) for start in starts]
        vectors = _concatenated(builder, runs, count)
        for column, vector in zip(_bit_reversed(count), _deinterleaved(builder, vectors), strict=True):
            builder.store(vector, _line(builder, args[2], args[3], column), align=LANES)
        return context.get_dummy_value()

    return types.void(source, places, target, row, width), emit


@intrinsic
def put_columns(
    _typing: Untyped, source: Untyped, row: Untyped, target: Untyped, places: Untyped, width: Untyped
) -> Untyped:
    """target[places[t] + c] = source[(row + c) * LANES + t]: the way back of `take_columns`, for single bytes."""
    if not isinstance(width, types.IntegerLiteral):
        return None
    count = width.literal_value

    def emit(context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        lines = [_line(builder, args[0], args[1], column) for column in _bit_reversed(count)]
        vectors = _interleaved(builder, [builder.load(line, align=LANES) for line in lines])
        for t, run in enumerate(_runs(builder, args[2], args[3], count)):
            vector, place = vectors[t * count // LANES], t * count % LANES
            builder.store(_shuffle(builder, vector, vector, list(range(place, place + count))), run, align=1)
        return context.get_dummy_value()

    return types.void(source, row, target, places, width), emit


def _shuffle(builder: Untyped, a: Untyped, b: Untyped, places: list[int]) -> Untyped:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places))


def _bit_reversed(count: int) -> list[int]:
    """0 .. count-1 in the order in which the stages leave the columns."""
    return [0] if count == 1 else [2 * k + odd for odd in (0, 1) for k in _bit_reversed(count // 2)]


def _deinterleaved(builder: Untyped, vectors: list[Any]) -> list[Any]:
    if len(vectors) == 1:
        return vectors
    pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
    halves = [[_shuffle(builder, a, b, places) for a, b in pairs] for places in (_EVEN, _ODD)]
    return [vector for half in halves for vector in _deinterleaved(builder, half)]


def _interleaved(builder: Untyped, vectors: list[Any]) -> list[Any]:
    if len(vectors) == 1:
        return vectors
    middle = len(vectors) // 2
    even, odd = _interleaved(builder, vectors[:middle]), _interleaved(builder, vectors[middle:])
    return [_shuffle(builder, a, b, places) for a, b in zip(even, odd, strict=True) for places in (_LOW, _HIGH)]


def _concatenated(builder: Untyped, runs: list[Any], count: int) -> list[Any]:
    """Join LANES runs of `count` numbers to `count` vectors of LANES."""
    while count < LANES:
        runs = [_shuffle(builder, a, b, list(range(2 * count))) for a, b in zip(runs[::2], runs[1::2], strict=True)]
        count *= 2
    return runs


def _runs(builder: Untyped, start: Untyped, places: Untyped, count: int) -> list[Any]:
    """Pointers to the runs of `count` numbers at start + places[t], t < LANES."""
    kind = ir.VectorType(start.type.pointee, count).as_pointer()
    offsets = [builder.load(builder.gep(places, [ir.IntType(64)(t)])) for t in range(LANES)]
    return [builder.bitcast(builder.gep(start, [offset]), kind) for offset in offsets]


def _line(builder: Untyped, start: Untyped, row: Untyped, column: int) -> Untyped:
    """A pointer to the vector in row + column of an array of lanes."""
    place = builder.mul(builder.add(row, ir.Constant(row.type, column)), ir.Constant(row.type, LANES))
    return builder.bitcast(builder.gep(start, [place]), ir.VectorType(start.type.pointee, LANES).as_pointer())
