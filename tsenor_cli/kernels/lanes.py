"""Sixteen numbers side by side as one value in compiled code: `x = load(w, k) - load(v, j)`.

numba vectorises a loop only after proving, each time the loop starts, that its arrays do not overlap; before a loop of
sixteen that proof costs more than the loop. So the kernels name their vectors. Arithmetic is IEEE, lane by lane, never
contracted or reassociated: the same bits on any machine, however wide its registers are.

Arrays of lanes have the shape [rows, LANES] and are C-contiguous.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numba.extending
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import models, overload, register_model

from tsenor_cli.kernels.contract import Untyped

intrinsic: Untyped = numba.extending.intrinsic  # typed, it would promise the typing context as an argument

LANES = 16  # one AVX-512 vector of float32, two of AVX, four of NEON


class Vector(types.Type):
    """LANES numbers of one scalar type; a comparison gives a vector of booleans."""

    def __init__(self, scalar: Untyped) -> None:
        self.scalar = scalar
        super().__init__(name=f"Vector({scalar})")


_LLVM_SCALARS = {
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
    types.uint8: ir.IntType(8),
    types.boolean: ir.IntType(1),
}


def llvm_vector(scalar: Untyped) -> Untyped:
    return ir.VectorType(_LLVM_SCALARS[scalar], LANES)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Untyped, kind: Vector) -> None:
        super().__init__(manager, kind, llvm_vector(kind.scalar))  # type: ignore[no-untyped-call]


def row_pointer(
    context: Untyped, builder: Untyped, array: Untyped, value: Untyped, row: Untyped, to: Untyped
) -> Untyped:
    """Emit the address of array[row, 0] as a pointer to the LLVM type `to`. No bounds are checked."""
    data = context.make_array(array)(context, builder, value).data
    across = ir.Constant(row.type, LANES)
    return builder.bitcast(builder.gep(data, [builder.mul(row, across)]), to.as_pointer())


@intrinsic
def load(_typing: Untyped, array: Untyped, row: Untyped) -> Untyped:
    """array[row] as a vector."""

    def emit(context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        pointer = row_pointer(context, builder, array, args[0], args[1], llvm_vector(array.dtype))
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return Vector(array.dtype)(array, row), emit


@intrinsic
def store(_typing: Untyped, array: Untyped, row: Untyped, vector: Untyped) -> Untyped:
    """array[row] = vector."""

    def emit(context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        pointer = row_pointer(context, builder, array, args[0], args[1], llvm_vector(array.dtype))
        builder.store(args[2], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, row, vector), emit


@intrinsic
def spread(_typing: Untyped, number: Untyped) -> Untyped:
    """Put one number into all lanes."""

    def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        vector, first = llvm_vector(number), ir.IntType(32)(0)
        single = builder.insert_element(ir.Constant(vector, ir.Undefined), args[0], first)
        return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(ir.IntType(32), LANES), None))

    return Vector(number)(number), emit


@intrinsic
def bits(_typing: Untyped, vector: Untyped) -> Untyped:
    """A vector of booleans as one uint16, lane t in bit t."""

    def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        return builder.bitcast(args[0], ir.IntType(LANES))

    return types.uint16(vector), emit


@intrinsic
def where(_typing: Untyped, condition: Untyped, yes: Untyped, no: Untyped) -> Untyped:
    """Lane by lane: yes where the condition holds, else no."""

    def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        return builder.select(*args)

    return yes(condition, yes, no), emit


@intrinsic
def as_float64(_typing: Untyped, vector: Untyped) -> Untyped:
    """Convert a vector of float32, exactly; one of float64 stays what it is."""

    def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        return args[0] if vector.scalar == types.float64 else builder.fpext(args[0], llvm_vector(types.float64))

    return Vector(types.float64)(vector), emit


@intrinsic
def as_float32(_typing: Untyped, vector: Untyped) -> Untyped:
    """Round a vector of float64 to nearest; one of float32 stays what it is."""

    def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        return args[0] if vector.scalar == types.float32 else builder.fptrunc(args[0], llvm_vector(types.float32))

    return Vector(types.float32)(vector), emit


@intrinsic
def as_count(_typing: Untyped, vector: Untyped) -> Untyped:
    """0 or 1 (uint8) for false or true."""

    def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        return builder.zext(args[0], llvm_vector(types.uint8))

    return Vector(types.uint8)(vector), emit


def _operator(python: Untyped, result: Callable[[Untyped], Any], instruction: Callable[..., Any]) -> None:
    """Let `a python b` on two vectors of the same type emit instruction(builder, a, b, scalar type)."""

    @intrinsic
    def implementation(_typing: Untyped, a: Untyped, b: Untyped) -> Untyped:
        def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
            return instruction(builder, *args, a.scalar)

        return Vector(result(a.scalar))(a, b), emit

    @overload(python)
    def choose(a: Untyped, b: Untyped) -> Untyped:
        def apply(a: Untyped, b: Untyped) -> Untyped:
            return implementation(a, b)

        return apply if isinstance(a, Vector) and a == b else None


def _add(builder: Untyped, a: Untyped, b: Untyped, scalar: Untyped) -> Untyped:
    return builder.add(a, b) if scalar == types.uint8 else builder.fadd(a, b)


def _greater(builder: Untyped, a: Untyped, b: Untyped, scalar: Untyped) -> Untyped:
    return builder.icmp_unsigned(">", a, b) if scalar == types.uint8 else builder.fcmp_ordered(">", a, b)


def _differ(builder: Untyped, a: Untyped, b: Untyped, scalar: Untyped) -> Untyped:
    return builder.icmp_unsigned("!=", a, b) if scalar == types.uint8 else builder.fcmp_unordered("!=", a, b)


_operator(operator.add, lambda scalar: scalar, _add)
_operator(operator.sub, lambda scalar: scalar, lambda builder, a, b, _: builder.fsub(a, b))
_operator(operator.mul, lambda scalar: scalar, lambda builder, a, b, _: builder.fmul(a, b))
_operator(operator.and_, lambda scalar: scalar, lambda builder, a, b, _: builder.and_(a, b))
_operator(operator.or_, lambda scalar: scalar, lambda builder, a, b, _: builder.or_(a, b))
_operator(operator.gt, lambda _: types.boolean, _greater)
_operator(operator.ge, lambda _: types.boolean, lambda builder, a, b, _: builder.fcmp_ordered(">=", a, b))
_operator(operator.ne, lambda _: types.boolean, _differ)
