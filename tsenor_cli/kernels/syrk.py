"""XᵀX of bfloat16 matrices (BLAS: syrk), on processors that multiply pairs of bfloat16 numbers themselves.

AVX512-BF16 adds two products to each float32 of a register in one instruction, twice as many as it does of float32.
torch has that too, but rounds the sums to bfloat16. Here products are exact; sums are those of float32, as good as
torch's of float32 numbers (docs/decisions/0011).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils

from tsenor_cli.kernels.compilation import compiled, compiling
from tsenor_cli.kernels.contract import Untyped
from tsenor_cli.kernels.lanes import (
    LANES,
    as_bits,
    as_float,
    intrinsic,
    lanes,
    llvm_vector,
    load,
    offset,
    pointer,
    splat,
    spread,
    store,
)
from tsenor_cli.kernels.threads import over_chunks

BFloat16s = npt.NDArray[np.uint16]
Words = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Range = tuple[int, int]

_ROWS = 2048  # that are summed up in float32; what they come to is added in float64
_RUN = 64  # instructions that add to the same registers: Zen 4 cuts off what does not fit, always downwards
_DOWN, _PANELS = 4, 6  # a tile of results; with what is multiplied, it takes 31 of 32 registers
_ACROSS = _PANELS * LANES


def takes(x: torch.Tensor) -> bool:
    """Whether `x` can be multiplied here: bfloat16, on a processor that has the instruction."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and _available()


@cache
def _available() -> bool:
    """Whether this processor has the instruction, and the compiler knows it and is to use it."""
    chosen = numba.config.CPU_NAME or numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    has = binding.get_host_cpu_features().get("avx512bf16", False)
    return bool(has) and not chosen and binding.llvm_version_info[0] >= 16


def add_products(x: BFloat16s, total: Doubles, ranges: Iterable[Range]) -> None:
    """Add XᵀX to `total` in some ranges of columns: all that is on and above the diagonal, and some of what is below.

    Args:
        x: [rows, features], bits of bfloat16, C-contiguous.
        total: [features, features], C-contiguous.
        ranges: of columns, each from a first one to before a last one. The cuts make no difference to the sums.
    """
    add = _compile().add

    def band(panels: Words, start: int, columns: Range, tile: Floats) -> None:
        add(panels, start, total, *columns, tile)

    _over_bands(x, ranges, band)


def energy(x: BFloat16s, gram: Doubles) -> float:
    """Σ (XᵀX)_ij G_ij of x [rows, features], bits of bfloat16, C-contiguous, and a symmetric G [features, features].

    Only the upper triangle of G is read. The same for any number of threads.
    """
    dot, found = _compile().dot, []

    def band(panels: Words, start: int, _: Range, tile: Floats) -> None:
        found.append(dot(panels, start, gram, tile, np.zeros(_ACROSS)))

    _over_bands(x, [(0, len(gram))], band)
    return math.fsum(found)


def _over_bands(x: BFloat16s, ranges: Iterable[Range], work: Callable[[Words, int, Range, Floats], None]) -> None:
    """Call work(panels, start, columns, tile) for each band of columns that reaches into a range, the longest first."""
    pack = _compile().pack
    bands = [(band * _ACROSS, columns) for columns in ranges for band in _bands(*columns)][::-1]
    count = _PANELS * max((_bands(*columns).stop for _, columns in bands), default=0)
    room = lanes(count * -(-min(len(x), _ROWS) // 2), np.int32)
    for row in range(0, len(x), _ROWS):
        rows = x[row : row + _ROWS]
        pairs = -(-len(rows) // 2)
        panels = room[: count * pairs].reshape(count, pairs, LANES)

        def fill(start: int, end: int, _: None, rows: BFloat16s = rows, panels: Words = panels) -> None:
            pack(rows, panels, start, end)

        def multiply(start: int, end: int, tile: Floats, panels: Words = panels) -> None:
            for first, columns in bands[start:end]:
                work(panels, first, columns, tile)

        over_chunks(fill, count, _PANELS, (None, lambda: None))
        over_chunks(multiply, len(bands), 1, ("syrk", lambda: lanes(_DOWN * _PANELS, np.float32).reshape(_DOWN, -1)))


def _bands(first: int, last: int) -> range:
    return range(first // _ACROSS, -(-last // _ACROSS))


class _Kernels(NamedTuple):
    pack: Untyped
    add: Untyped
    dot: Untyped


@cache
def _compile() -> _Kernels:
    """All of them, compiled or loaded by calls that have nothing to do."""
    panels, tile = np.zeros((0, 0, LANES), np.int32), np.zeros((_DOWN, _ACROSS), np.float32)
    nothing = np.zeros((0, 0))
    with compiling():
        _pack(np.zeros((0, 0), np.uint16), panels, 0, 0)
        _add(panels, 0, nothing, 0, 0, tile)
        _dot(panels, 0, nothing, tile, np.zeros(_ACROSS))
    return _Kernels(_pack, _add, _dot)


@compiled
def _pack(x: BFloat16s, panels: Words, start: int, end: int) -> None:
    """panels[q, p, t] = rows 2p (the lower half) and 2p + 1 of column 16 q + t, and zeros outside of x."""
    (rows, features), from_, to = x.shape, pointer(x), pointer(panels)
    for panel in range(start, end):
        column = panel * LANES
        for pair in range(panels.shape[1]):
            if column + LANES <= features and 2 * pair + 1 < rows:
                place = 2 * pair * features + column
                low = as_bits(as_float(load(offset(from_, place), 0)), False)
                high = as_bits(as_float(load(offset(from_, place + features), 0)), False)
                low = (low >> spread(np.int32(16))) & spread(np.int32(0xFFFF))
                store(to, panel * panels.shape[1] + pair, low | high)
            else:
                for t in range(LANES):
                    panels[panel, pair, t] = 0
                for row in range(2 * pair, min(2 * pair + 2, rows)):
                    for t in range(min(LANES, features - column)):
                        word = np.int32(x[row, column + t]) << np.int32(16 * (row % 2))
                        panels[panel, pair, t] |= word


@compiled
def _add(panels: Words, start: int, total: Doubles, first: int, last: int, tile: Floats) -> None:
    first, last = max(first, start), min(last, start + _ACROSS)
    for top in range(0, last, _DOWN):
        _fill(panels, top, start, tile)
        for i in range(min(_DOWN, len(total) - top)):
            for j in range(first, last):
                total[top + i, j] += tile[i, j - start]


@compiled
def _dot(panels: Words, start: int, gram: Doubles, tile: Floats, sums: Doubles) -> float:
    last = min(len(gram), start + _ACROSS)
    for top in range(0, last, _DOWN):
        _fill(panels, top, start, tile)
        for row in range(top, min(top + _DOWN, len(gram))):
            for j in range(max(row + 1, start), last):
                sums[j - start] += 2 * gram[row, j] * tile[row - top, j - start]
            if start <= row < last:
                sums[row - start] += gram[row, row] * tile[row - top, row - start]
    return float(sums.sum())


@compiled
def _fill(panels: Words, top: int, start: int, tile: Floats) -> None:
    """The tile of results whose first row is `top` and whose first column is `start`."""
    pairs, words, to = panels.shape[1], pointer(panels), pointer(tile)
    tile[:] = 0
    down = offset(words, top // LANES * pairs * LANES + top % LANES)
    across = offset(words, start * pairs)
    for pair in range(0, pairs, _RUN):
        _multiply(down, across, pair, min(pair + _RUN, pairs), pairs, to)


@intrinsic
def _multiply(
    _typing: Untyped, down: Untyped, across: Untyped, first: Untyped, last: Untyped, pairs: Untyped, to: Untyped
) -> Untyped:
    """Add the products of the pairs from `first` to `last` to a tile."""

    def emit(context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        start, end, panel = args[2:5]
        word, floats, product = start.type, llvm_vector(types.float32), _instruction(builder.module)
        before, loop, done = builder.block, *map(builder.append_basic_block, ("pairs", "summed"))
        builder.branch(loop)
        builder.position_at_end(loop)
        pair = builder.phi(word)
        sums = [builder.phi(floats) for _ in range(_DOWN * _PANELS)]
        row = builder.mul(pair, word(LANES))
        left, right = [], []
        for i in range(_DOWN):
            single = builder.load(builder.gep(args[0], [builder.add(row, word(i))]))
            left.append(builder.bitcast(splat(builder, single, LANES), _PAIRS))
        for t in range(_PANELS):
            place = builder.add(row, builder.mul(panel, word(t * LANES)))
            right.append(builder.load(_vector(builder, args[1], place, _PAIRS), align=4 * LANES))
        added = [builder.call(product, [a, left[k // _PANELS], right[k % _PANELS]]) for k, a in enumerate(sums)]
        following = builder.add(pair, word(1))
        for phi, at_first, then in [
            (pair, start, following),
            *((sum_, ir.Constant(floats, None), new) for sum_, new in zip(sums, added, strict=True)),
        ]:
            phi.add_incoming(at_first, before)
            phi.add_incoming(then, loop)
        builder.cbranch(builder.icmp_signed("<", following, end), loop, done)
        builder.position_at_end(done)
        for k, sum_ in enumerate(added):
            place = _vector(builder, args[5], word(k * LANES), floats)
            builder.store(builder.fadd(builder.load(place, align=4 * LANES), sum_), place, align=4 * LANES)
        return context.get_dummy_value()

    return types.void(down, across, first, last, pairs, to), emit


def _vector(builder: Untyped, start: Untyped, place: Untyped, kind: Untyped) -> Untyped:
    return builder.bitcast(builder.gep(start, [place]), kind.as_pointer())


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's type, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


def _instruction(module: Untyped) -> Untyped:
    """sums, a, b → sums + a_0 b_0 + a_1 b_1, lane by lane."""
    floats = llvm_vector(types.float32)
    kind = ir.FunctionType(floats, [floats, _PAIRS, _PAIRS])
    return cgutils.get_or_insert_function(module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")  # type: ignore[no-untyped-call]
