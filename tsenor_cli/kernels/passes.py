"""The dual passes, compiled once per pattern.

A selection network is straight-line code on vectors, one lane per block. Written as LLVM vectors it compiles in a
hundredth of the time that the same lines take through numba's loop vectoriser, keeps the values in registers, and
gives the same bits on any vector width. Integers, because most machines compare more of them at a time than floats.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils

from tsenor_cli.kernels.compilation import compiled_callback
from tsenor_cli.kernels.contract import Untyped
from tsenor_cli.kernels.lanes import CACHE_LINE, LANES, call_llvm, intrinsic, offset, splat
from tsenor_cli.kernels.network import selection_network

LIMIT = 1 << 29  # duals start within ± this, and the first few passes do not take them far enough to overflow
RAMP = 3  # sixteenths by which a pass goes further than the one before


class Schedule(NamedTuple):
    """How many dual passes, rows and columns in turn, and how far they go."""

    first: int  # in 32 bits, to bring rows and columns of any scale near their thresholds
    coarse: int  # in 16 bits, of what is left; odd
    last: int  # in 32 bits; odd, as rows come first and last
    furthest: int  # largest over-relaxation, in sixteenths: below 16 in 16 bits, up to 6 in 32


class Ahead(NamedTuple):
    """Memory to bring into the cache during the passes, because the hardware does not guess the next tiles.

    The passes are where there is time for it: asked for all at once, it would hold up everything else.
    """

    start: int  # the address
    stride: int  # bytes from a row to the next; m rows
    lines: int  # cache lines of a row; 0 for nothing


@cache
def dual_passes_address(m: int, n: int, bits: int = 32) -> int:
    """Compile or load the dual passes of one pattern; the address is for `call_dual_passes`.

    The function takes q [m, m, LANES], u [m, LANES], v [m, LANES] (integers of 32 or 16 bits), a number of passes, the
    largest over-relaxation in sixteenths, and an Ahead; it starts from v and leaves in u and v the duals after that
    many passes, over the rows and over the columns in turn. They go further than to the middle, both of a pair by RAMP
    sixteenths of their way more than the pair before (docs/mathematics.md); the first two and the last one do not.
    """
    width = min(LANES, _vector_bits() // bits)
    integers: Untyped = types.CPointer(types.Integer.from_bitwidth(bits))  # type: ignore[no-untyped-call]
    by_xor = int(_minima_wait())
    together = m if m <= 8 else 1  # lines at a time: as long as all that they share stays in registers

    def dual_passes(
        q: Untyped,
        u: Untyped,
        v: Untyped,
        passes: Untyped,
        furthest: Untyped,
        start: Untyped,
        stride: Untyped,
        lines: Untyped,
    ) -> None:
        share = -(-lines // passes)  # cache lines to ask for in each row during one pass
        for number in range(passes):
            # One loop for both directions, so that the network is compiled once.
            along_rows = number % 2 == 0
            line = m * LANES if along_rows else LANES
            step = LANES if along_rows else m * LANES
            fixed = v if along_rows else u
            found = u if along_rows else v
            beyond = min((number // 2) * RAMP, furthest) if number < passes - 1 else 0
            for k in range(0, m, together):
                for lane in range(0, LANES, width):
                    _relax(
                        offset(q, k * line + lane),
                        line,
                        step,
                        offset(fixed, lane),
                        offset(found, k * LANES + lane),
                        beyond,
                        m,
                        n,
                        together,
                        width,
                        by_xor,
                    )
                for row in range(k, k + together):
                    for part in range(number * share, min((number + 1) * share, lines)):
                        _prefetch(start + row * stride + part * CACHE_LINE)

    count = types.intp
    return compiled_callback(types.void(integers, integers, integers, count, count, count, count, count), dual_passes)


@intrinsic
def call_dual_passes(
    _typing: Untyped,
    address: Untyped,
    q: Untyped,
    u: Untyped,
    v: Untyped,
    passes: Untyped,
    furthest: Untyped,
    ahead: Untyped,
) -> Untyped:
    """Call the function behind an address from compiled code."""

    def emit(context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        values = [*args[1:6], *(builder.extract_value(args[6], k) for k in range(3))]
        of = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.call(builder.inttoptr(args[0], of.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(address, q, u, v, passes, furthest, ahead), emit


@intrinsic
def _prefetch(_typing: Untyped, address: Untyped) -> Untyped:
    """Ask for the cache line at an address: to be read, into level 2."""

    def emit(context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        word, pointer = ir.IntType(32), builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")  # type: ignore[no-untyped-call]
        builder.call(function, [pointer, word(0), word(2), word(1)])
        return context.get_dummy_value()

    return types.void(address), emit


@intrinsic
def _relax(
    _typing: Untyped,
    q: Untyped,
    line: Untyped,
    step: Untyped,
    fixed: Untyped,
    found: Untyped,
    beyond: Untyped,
    m: Untyped,
    n: Untyped,
    lines: Untyped,
    width: Untyped,
    by_xor: Untyped,
) -> Untyped:
    """found[i * LANES + t] = middle + 2 * ((middle - found[i * LANES + t]) * beyond / 32, rounded down) for i < lines.

    `middle` is midway between the n-th and (n+1)-th largest of q[i * line + k * step + t] - fixed[k * LANES + t] over
    k < m. `t` runs over `width` lanes; m, n, lines, width and by_xor are compile-time constants.
    """
    if not isinstance(m, types.IntegerLiteral):
        return None  # numba asks with the plain types first
    size, kept, lanes = m.literal_value, n.literal_value, width.literal_value
    vector = ir.VectorType(ir.IntType(q.dtype.bitwidth), lanes)
    align = q.dtype.bitwidth // 8

    def emit(context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        q, line, step, fixed, found, beyond = args[:6]

        def place(start: Untyped, index: Untyped) -> Untyped:
            return builder.bitcast(builder.gep(start, [index]), vector.as_pointer())

        def times(index: Untyped, factor: int) -> Untyped:
            return builder.mul(index, index.type(factor))

        @cache
        def near(k: int) -> Untyped:
            return builder.load(place(fixed, line.type(k * LANES)), align=align)

        for i in range(lines.literal_value):
            start = builder.gep(q, [times(line, i)])

            def difference(k: int, start: Untyped = start) -> Untyped:
                return _within(builder, "sub", builder.load(place(start, times(step, k)), align=align), near(k))

            middle = _middle(builder, difference, size, kept, bool(by_xor.literal_value))
            _move(builder, middle, beyond, place(found, line.type(i * LANES)))
        return context.get_dummy_value()

    return types.void(q, line, step, fixed, found, beyond, m, n, lines, width, by_xor), emit


def _middle(builder: Untyped, value: Callable[[int], Any], m: int, n: int, by_xor: bool) -> Untyped:
    """Emit half the sum of the n-th and the (n+1)-th largest of value(0) .. value(m - 1), rounded down.

    A value is asked for when it is first compared: from there on it costs a register. by_xor: see _minima_wait.
    """
    values: dict[int, Any] = {}

    def known(k: int) -> Untyped:
        if k not in values:
            values[k] = value(k)
        return values[k]

    for high, low, want_high, want_low in selection_network(m, n):
        pair = [known(high), known(low)]
        if want_high:
            values[high] = call_llvm(builder, "smax", pair[0].type, pair)
        if want_low and want_high and by_xor:
            values[low] = builder.xor(builder.xor(*pair), values[high])  # the one of the two that is left
        elif want_low:
            values[low] = call_llvm(builder, "smin", pair[0].type, pair)
    a, b = known(n - 1), known(n)
    half = builder.ashr(builder.xor(a, b), ir.Constant(a.type, [1] * a.type.count))
    return builder.add(builder.and_(a, b), half)  # their sum might overflow


def _move(builder: Untyped, middle: Untyped, beyond: Untyped, target: Untyped) -> None:
    """Emit *target = middle + 2 * ((middle - *target) * beyond / 32, rounded down)."""
    align = middle.type.element.width // 8
    with builder.if_else(builder.icmp_signed("==", beyond, beyond.type(0))) as (exactly, further):
        with exactly:
            builder.store(middle, target, align=align)
        with further:
            way = _within(builder, "sub", middle, builder.load(target, align=align))
            half = _thirty_seconds(builder, way, beyond)
            builder.store(_within(builder, "add", _within(builder, "add", middle, half), half), target, align=align)


def _thirty_seconds(builder: Untyped, way: Untyped, count: Untyped) -> Untyped:
    """Emit way * count / 32, rounded down, for counts below 16.

    The upper halves of 16-bit products are one instruction. It needs no register of 512 bits: while one of those is in
    use, processors of Intel have two ports for vectors instead of three.
    """
    narrow, word = way.type, ir.IntType(32)
    if narrow.element.width == word.width:
        product = builder.mul(way, splat(builder, builder.trunc(count, word), narrow.count))
        return builder.ashr(product, ir.Constant(narrow, [5] * narrow.count))
    wide = ir.VectorType(word, narrow.count)
    factor = splat(builder, builder.trunc(builder.shl(count, count.type(11)), narrow.element), narrow.count)
    product = builder.mul(builder.sext(way, wide), builder.sext(factor, wide))
    return builder.trunc(builder.ashr(product, ir.Constant(wide, [16] * wide.count)), narrow)


def _within(builder: Untyped, operation: str, a: Untyped, b: Untyped) -> Untyped:
    """Emit a sum or a difference: numbers of 16 bits stay at their limits, those of 32 never reach them."""
    if a.type.element.width == 16:
        return call_llvm(builder, f"s{operation}.sat", a.type, [a, b])
    return getattr(builder, operation)(a, b)


def _minima_wait() -> bool:
    """Whether a xor b xor c, which AVX-512 has, runs on ports that minima cannot use: Intel's have fewer for those."""
    return _vector_bits() == 512 and not binding.get_host_cpu_name().startswith("znver")


def _vector_bits() -> int:
    """The width of a register here. Speed only: wider vectors than the machine has would spill."""
    features = binding.get_host_cpu_features()
    return 512 if features.get("avx512f") else 256 if features.get("avx2") else 128
