"""Products of bfloat16 numbers by the processor's own instructions: AMX, or AVX512-BF16.

Products are exact, sums are those of float32. A *panel* [pairs, LANES] is 16 columns of a matrix, two rows to a word:
word [p, t] has row 2p of column t in its lower half, and row 2p + 1 in its upper one.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Literal

import numba
from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils as _cgutils

from tsenor_cli.kernels.contract import Untyped
from tsenor_cli.kernels.lanes import LANES, intrinsic, llvm_vector, splat

Unit = Literal["amx", "avx512"]
PANELS = 6  # that are multiplied together
COLUMNS: dict[Unit, int] = {"amx": 2 * LANES, "avx512": 4}  # with which they are; 4 and 6 fill 31 of 32 registers
TILE = LANES  # words of a column that are in one tile of AMX

cgutils: Untyped = _cgutils  # numba does not type it
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18  # of Linux on x86-64


@cache
def unit() -> Unit | None:
    """What is faster here than torch's products of float32 numbers, if anything.

    Intel's processors have AVX512-BF16 too, but it does no more of these in a cycle than of float32.
    """
    if has("amx"):
        return "amx"
    return "avx512" if has("avx512") and binding.get_host_cpu_name().startswith("znver") else None


def has(wanted: Unit) -> bool:
    """Whether processor, system and compiler have it, and code is compiled for this processor."""
    chosen = numba.config.CPU_NAME or numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    if chosen or binding.llvm_version_info[0] < 16:
        return False
    name = "amx-bf16" if wanted == "amx" else "avx512bf16"
    return bool(binding.get_host_cpu_features().get(name)) and (wanted != "amx" or _tiles_are_granted())


@cache
def _tiles_are_granted() -> bool:
    """Linux gives tiles, 8 KiB of state of every thread, to processes that ask."""
    if not sys.platform.startswith("linux"):
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)


# --- AVX512-BF16 ------------------------------------------------------------------------------------------------------


@intrinsic
def add_pairs(
    _typing: Untyped, down: Untyped, across: Untyped, first: Untyped, last: Untyped, pairs: Untyped, to: Untyped
) -> Untyped:
    """Add the products of the pairs from `first` to `last` of 4 columns and 6 panels to float32 [4, 96].

    Args:
        down: pointer to the first of the columns in a panel, int32.
        across: pointer to panels int32 [6, pairs, LANES], on a cache line.
        first: int64.
        last: int64.
        pairs: int64; of which the panels are.
        to: pointer to the sums, on a cache line.
    """

    def emit(context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        start, end, panel = args[2:5]
        word, floats, count = start.type, llvm_vector(types.float32), COLUMNS["avx512"]
        product = _function(builder, "avx512bf16.dpbf16ps.512", floats, [floats, _PAIRS, _PAIRS])
        before, loop, done = builder.block, *map(builder.append_basic_block, ("pairs", "summed"))
        builder.branch(loop)
        builder.position_at_end(loop)
        pair = builder.phi(word)
        sums = [builder.phi(floats) for _ in range(count * PANELS)]
        row = builder.mul(pair, word(LANES))
        left, right = [], []
        for i in range(count):
            single = builder.load(builder.gep(args[0], [builder.add(row, word(i))]))
            left.append(builder.bitcast(splat(builder, single, LANES), _PAIRS))
        for t in range(PANELS):
            place = builder.add(row, builder.mul(panel, word(t * LANES)))
            right.append(builder.load(_at(builder, args[1], place, _PAIRS), align=4 * LANES))
        added = [builder.call(product, [a, left[k // PANELS], right[k % PANELS]]) for k, a in enumerate(sums)]
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
            place = _at(builder, args[5], word(k * LANES), floats)
            builder.store(builder.fadd(builder.load(place, align=4 * LANES), sum_), place, align=4 * LANES)
        return context.get_dummy_value()

    return types.void(down, across, first, last, pairs, to), emit


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's type, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


# --- AMX --------------------------------------------------------------------------------------------------------------

_BYTE, _WORD = ir.IntType(8), ir.IntType(64)
_BYTES, _LINE = _BYTE.as_pointer(), 4 * LANES
# LDTILECFG: palette 1; bytes in a line of each of eight tiles, 16 bits each; lines, 8 bits each.
_WHOLE_TILES = bytes([1, *[0] * 15, *[_LINE, 0] * 8, *[0] * 16, *[LANES] * 8, *[0] * 8])


@intrinsic
def multiply_tiles(_typing: Untyped, down: Untyped, across: Untyped, pairs: Untyped, to: Untyped) -> Untyped:
    """The products of 32 columns and 6 panels: float32 [32, 96].

    Sums are to nearest, two tiles and two tiles at a time. What the tiles were configured for is restored: libraries
    take for granted what they have found once.

    Args:
        down: pointer to two panels with every tile transposed, int32 [2, pairs / 16, LANES, 16].
        across: pointer to panels int32 [6, pairs, LANES].
        pairs: int64, a multiple of 16, not zero.
        to: pointer to the sums.
    """

    def emit(context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        down, across, pairs, to = args
        whole = cgutils.global_constant(builder.module, "whole_tiles", cgutils.make_bytearray(_WHOLE_TILES))
        own = builder.bitcast(whole, _BYTES)
        others = builder.bitcast(cgutils.alloca_once(builder, whole.type.pointee), _BYTES)
        _tile(builder, "sttilecfg", others)
        _tile(builder, "ldtilecfg", own)
        panel = builder.mul(pairs, _WORD(LANES))
        for t in range(0, PANELS, 2):
            sums = _at(builder, to, _WORD(t * LANES), to.type.pointee)
            _two_by_two(builder, down, builder.gep(across, [builder.mul(panel, _WORD(t))]), panel, sums)
        _tile(builder, "ldtilecfg", others)
        return context.get_dummy_value()

    return types.void(down, across, pairs, to), emit


def _two_by_two(builder: Untyped, down: Untyped, across: Untyped, panel: Untyped, to: Untyped) -> None:
    """Emit the products of two panels of `panel` words and two others; the tiles 0 to 3 are the sums."""
    for sum_ in range(4):
        _tile(builder, "tilezero", _BYTE(sum_))
    before, loop, done = builder.block, *map(builder.append_basic_block, ("tiles", "summed"))
    builder.branch(loop)
    builder.position_at_end(loop)
    place = builder.phi(_WORD)
    for number, (start, distance) in enumerate([(down, _WORD(0)), (down, panel), (across, _WORD(0)), (across, panel)]):
        _move(builder, "tileloadd64", 4 + number, _at(builder, start, builder.add(place, distance), _BYTE), _LINE)
    for sum_ in range(4):
        _tile(builder, "tdpbf16ps", _BYTE(sum_), _BYTE(4 + sum_ // 2), _BYTE(6 + sum_ % 2))
    following = builder.add(place, _WORD(TILE * LANES))
    place.add_incoming(_WORD(0), before)
    place.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, panel), loop, done)
    builder.position_at_end(done)
    for sum_ in range(4):
        first = _WORD((sum_ // 2 * PANELS * LANES + sum_ % 2) * LANES)
        _move(builder, "tilestored64", sum_, _at(builder, to, first, _BYTE), PANELS * _LINE)


def _move(builder: Untyped, name: str, tile: int, at: Untyped, distance: int) -> None:
    """Between a tile and memory, where its lines lie `distance` bytes apart."""
    _tile(builder, name, _BYTE(tile), at, _WORD(distance))


def _tile(builder: Untyped, name: str, *args: Untyped) -> None:
    builder.call(_function(builder, name, ir.VoidType(), [arg.type for arg in args]), args)


# --- both -------------------------------------------------------------------------------------------------------------


def _function(builder: Untyped, name: str, returns: Untyped, args: Untyped) -> Untyped:
    kind = ir.FunctionType(returns, args)
    return cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}")


def _at(builder: Untyped, start: Untyped, place: Untyped, kind: Untyped) -> Untyped:
    """The address of element `place`, where something of another kind lies."""
    return builder.bitcast(builder.gep(start, [place]), kind.as_pointer())
