"""The dual passes, compiled once per pattern: the only file that speaks LLVM.

A selection network is straight-line code on vectors, one lane per block. Written as LLVM vectors it compiles in a
hundredth of the time that the same lines take through numba's loop vectoriser, keeps the values in registers, and
gives the same bits on any vector width, because lanes never meet and nothing is reassociated.
"""

from __future__ import annotations

from functools import cache

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types

from tsenor_cli.kernels.compilation import compiled_callback
from tsenor_cli.kernels.contract import Untyped
from tsenor_cli.kernels.lanes import LANES, intrinsic
from tsenor_cli.kernels.network import selection_network

FLOATS: Untyped = types.CPointer(types.float32)  # type: ignore[no-untyped-call]


@cache
def dual_passes_address(m: int, n: int) -> int:
    """Compile or load the dual passes of one pattern; the address is for `call_dual_passes`.

    The function takes w [m, m, LANES], u [m, LANES], v [m, LANES] (float32) and a number of passes; it reads w and v,
    and leaves in u and v the duals after that many row passes with column passes between them.
    """
    width = _vector_width()

    def dual_passes(w: Untyped, u: Untyped, v: Untyped, passes: Untyped) -> None:
        for half in range(2 * passes - 1):
            # One loop for both directions, so that the network is compiled once.
            along_rows = half % 2 == 0
            line = m * LANES if along_rows else LANES
            step = LANES if along_rows else m * LANES
            fixed = v if along_rows else u
            found = u if along_rows else v
            for k in range(m):
                for lane in range(0, LANES, width):
                    _middle(_at(w, k * line + lane), step, _at(fixed, lane), _at(found, k * LANES + lane), m, n, width)

    return compiled_callback(types.void(FLOATS, FLOATS, FLOATS, types.intp), dual_passes)


@intrinsic
def call_dual_passes(
    _typing: Untyped, address: Untyped, w: Untyped, u: Untyped, v: Untyped, passes: Untyped
) -> Untyped:
    """Call the function behind an address from compiled code, on contiguous float32 arrays."""

    def generate(context: Untyped, builder: Untyped, signature: Untyped, args: Untyped) -> Untyped:
        arrays = [
            context.make_array(kind)(context, builder, value).data
            for kind, value in zip(signature.args[1:4], args[1:4], strict=True)
        ]
        pointers = [builder.bitcast(data, ir.FloatType().as_pointer()) for data in arrays]
        of = ir.FunctionType(ir.VoidType(), [pointer.type for pointer in pointers] + [args[4].type])
        builder.call(builder.inttoptr(args[0], of.as_pointer()), [*pointers, args[4]])
        return context.get_dummy_value()

    return types.void(address, w, u, v, passes), generate


@intrinsic
def _at(_typing: Untyped, pointer: Untyped, index: Untyped) -> Untyped:
    """Return pointer + index."""

    def generate(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, index), generate


@intrinsic
def _middle(
    _typing: Untyped, x: Untyped, step: Untyped, fixed: Untyped, found: Untyped, m: Untyped, n: Untyped, width: Untyped
) -> Untyped:
    """found[t] = midway between the n-th and (n+1)-th largest of x[k * step + t] - fixed[k * LANES + t] over k < m.

    `t` runs over `width` lanes; m, n and width are compile-time constants.
    """
    if not isinstance(m, types.IntegerLiteral):
        return None  # numba asks with the plain types first
    size, kept, lanes = m.literal_value, n.literal_value, width.literal_value
    vector = ir.VectorType(ir.FloatType(), lanes)

    def generate(context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        def place(pointer: Untyped, index: Untyped) -> Untyped:
            return builder.bitcast(builder.gep(pointer, [index]), vector.as_pointer())

        values, index_type = [], args[1].type
        for k in range(size):
            near = place(args[2], ir.Constant(index_type, k * LANES))
            far = place(args[0], builder.mul(args[1], ir.Constant(index_type, k)))
            values.append(builder.fsub(builder.load(far, align=4), builder.load(near, align=4)))
        for high, low, want_high, want_low in selection_network(size, kept):
            a, b = values[high], values[low]
            in_order = builder.fcmp_ordered(">", a, b)
            values[high] = builder.select(in_order, a, b) if want_high else None
            values[low] = builder.select(in_order, b, a) if want_low else None
        total = builder.fadd(values[kept - 1], values[kept])
        half = ir.Constant(vector, [0.5] * lanes)
        builder.store(builder.fmul(half, total), place(args[3], ir.Constant(index_type, 0)), align=4)
        return context.get_dummy_value()

    return types.void(x, step, fixed, found, m, n, width), generate


def _vector_width() -> int:
    """Lanes of a register here. Speed only: wider vectors than the machine has would spill."""
    features = binding.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx") else 4
