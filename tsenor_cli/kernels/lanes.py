"""Sixteen numbers side by side as one value in compiled code: `x = load(w, k) - load(v, j)`.

numba vectorises a loop only after proving, each time the loop starts, that its arrays do not overlap; before a loop of
sixteen that proof costs more than the loop. So the kernels name their vectors. Integer arithmetic wraps; that of floats
is IEEE, lane by lane, never contracted or reassociated: the same bits on any machine, however wide its registers are.

Arrays of lanes have the shape [rows, LANES] and are C-contiguous.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import numba.extending
import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import models, overload, register_model

from tsenor_cli.kernels.contract import Untyped

intrinsic: Untyped = numba.extending.intrinsic  # typed, it would promise the typing context as an argument

CACHE_LINE = 64  # bytes
LANES = 16  # one AVX-512 vector of 32-bit numbers, two of AVX2, four of NEON


class Vector(types.Type):
    """LANES numbers of one scalar type; a comparison gives a vector of booleans."""

    def __init__(self, scalar: Untyped) -> None:
        self.scalar = scalar
        super().__init__(name=f"Vector({scalar})")


_LLVM_SCALARS = {
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
    types.uint8: ir.IntType(8),
    types.uint16: ir.IntType(16),
    types.int16: ir.IntType(16),
    types.int32: ir.IntType(32),
    types.int64: ir.IntType(64),
    types.boolean: ir.IntType(1),
}
_FLOATS = {types.float32, types.float64}


def llvm_vector(scalar: Untyped) -> Untyped:
    return ir.VectorType(_LLVM_SCALARS[scalar], LANES)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Untyped, kind: Vector) -> None:
        super().__init__(manager, kind, llvm_vector(kind.scalar))  # type: ignore[no-untyped-call]


# --- in and out of memory ---------------------------------------------------------------------------------------------


def lanes(rows: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros [rows, LANES] that start on a cache line.

    A vector that lies across two lines takes twice as long to load: the dual passes would lose a third of their speed.
    """
    dtype = np.dtype(dtype)
    room = np.zeros(rows * LANES * dtype.itemsize + CACHE_LINE, np.uint8)
    first = -room.ctypes.data % CACHE_LINE
    return room[first : first + rows * LANES * dtype.itemsize].view(dtype).reshape(rows, LANES)


@intrinsic
def pointer(_typing: Untyped, array: Untyped) -> Untyped:
    """Where a C-contiguous array starts; `pointer(array)[k]` is element k. The caller keeps the array alive.

    Compiled code that is handed arrays counts its references to them, in atomic operations, at every call. Pointers
    are free, so the inner functions of the kernels take only these.
    """

    def emit(context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        return context.make_array(array)(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), emit  # type: ignore[no-untyped-call]


@intrinsic
def offset(_typing: Untyped, start: Untyped, count: Untyped) -> Untyped:
    """The pointer to element `count` of `start`."""

    def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        return builder.gep(args[0], [args[1]])

    return start(start, count), emit


def _vector_pointer(builder: Untyped, start: Untyped, row: Untyped) -> Untyped:
    """The address of row `row` of an array of lanes."""
    first = builder.mul(row, ir.Constant(row.type, LANES))
    return builder.bitcast(builder.gep(start, [first]), ir.VectorType(start.type.pointee, LANES).as_pointer())


@intrinsic
def load(_typing: Untyped, start: Untyped, row: Untyped) -> Untyped:
    """Row `row` of the array of lanes at `start`."""

    def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        return builder.load(_vector_pointer(builder, *args), align=start.dtype.bitwidth // 8)

    return Vector(start.dtype)(start, row), emit


@intrinsic
def load_every(_typing: Untyped, start: Untyped, step: Untyped) -> Untyped:
    """start[0], start[step] .. start[(LANES - 1) * step]."""

    def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        first, step = args
        vector = ir.Constant(llvm_vector(start.dtype), ir.Undefined)
        for t in range(LANES):
            number = builder.load(builder.gep(first, [builder.mul(step, step.type(t))]))
            vector = builder.insert_element(vector, number, ir.IntType(32)(t))
        return vector

    return Vector(start.dtype)(start, step), emit


@intrinsic
def store(_typing: Untyped, start: Untyped, row: Untyped, vector: Untyped) -> Untyped:
    """Row `row` of the array of lanes at `start` = vector."""

    def emit(context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        builder.store(args[2], _vector_pointer(builder, *args[:2]), align=start.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(start, row, vector), emit


@intrinsic
def spread(_typing: Untyped, number: Untyped) -> Untyped:
    """Put one number into all lanes."""

    def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        return splat(builder, args[0], LANES)

    return Vector(types.unliteral(number))(number), emit  # type: ignore[no-untyped-call]


def splat(builder: Untyped, number: Untyped, count: int) -> Untyped:
    """Emit a vector of `count` times the same number."""
    single = builder.insert_element(
        ir.Constant(ir.VectorType(number.type, count), ir.Undefined), number, ir.IntType(32)(0)
    )
    return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(ir.IntType(32), count), None))


# --- conversions ------------------------------------------------------------------------------------------------------


@intrinsic
def as_float(_typing: Untyped, vector: Untyped) -> Untyped:
    """The numbers that the elements of scores stand for: see Scores in contract.py."""

    def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        decode = {types.uint16: _bfloat16, types.int16: _float16}.get(vector.scalar)
        return args[0] if decode is None else decode(builder, args[0])

    return Vector(vector.scalar if vector.scalar in _FLOATS else types.float32)(vector), emit


def _bfloat16(builder: Untyped, halves: Untyped) -> Untyped:
    """The upper half of a float32."""
    words = llvm_vector(types.int32)
    wide = builder.shl(builder.zext(halves, words), ir.Constant(words, [16] * LANES))
    return builder.bitcast(wide, llvm_vector(types.float32))


def _float16(builder: Untyped, halves: Untyped) -> Untyped:
    """Exponent and mantissa moved to their places in a float32, then rescaled, which also normalises denormals.

    Not every machine has an instruction for it. Finite non-negative numbers only.
    """
    words, floats = llvm_vector(types.int32), llvm_vector(types.float32)
    wide = builder.shl(builder.zext(halves, words), ir.Constant(words, [13] * LANES))
    return builder.fmul(builder.bitcast(wide, floats), ir.Constant(floats, [2.0**112] * LANES))


def _conversion(scalar: Untyped, instructions: dict[Untyped, str]) -> Untyped:
    """A conversion to `scalar`; `instructions` has the name of the LLVM instruction for each type it starts from."""

    @intrinsic
    def convert(_typing: Untyped, vector: Untyped) -> Untyped:
        def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
            if vector.scalar == scalar:
                return args[0]
            return getattr(builder, instructions[vector.scalar])(args[0], llvm_vector(scalar))

        return Vector(scalar)(vector), emit

    return convert


as_float64 = _conversion(types.float64, {types.float32: "fpext", types.int32: "sitofp", types.int64: "sitofp"})
as_float32 = _conversion(types.float32, {types.int32: "sitofp"})
as_int16 = _conversion(types.int16, {types.int32: "trunc"})
as_int32 = _conversion(  # of floats: towards zero
    types.int32, {types.float32: "fptosi", types.float64: "fptosi", types.int16: "sext"}
)
as_int64 = _conversion(types.int64, {types.float64: "fptosi", types.int32: "sext", types.uint8: "zext"})
as_count = _conversion(types.uint8, {types.boolean: "zext"})  # 0 or 1


@intrinsic
def match(_typing: Untyped, vector: Untyped, other: Untyped) -> Untyped:
    """A vector of float64 in the type of `other`, float32 or float64."""

    def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        return args[0] if other.scalar == vector.scalar else builder.fptrunc(args[0], llvm_vector(other.scalar))

    return other(vector, other), emit


_INFINITIES = {types.uint16: 0x7F80, types.int16: 0x7C00, types.float32: 0x7F80 << 16, types.float64: 0x7FF0 << 48}


@intrinsic
def infinity_bits(_typing: Untyped, vector: Untyped) -> Untyped:
    """The bits of infinity as an element of scores."""
    scalar = types.Integer.from_bitwidth(vector.scalar.bitwidth, signed=True)

    def emit(_context: Untyped, _builder: Untyped, _signature: Untyped, _args: Untyped) -> Untyped:
        return ir.Constant(_LLVM_SCALARS[scalar], _INFINITIES[vector.scalar])

    return scalar(vector), emit


@intrinsic
def as_bits(_typing: Untyped, vector: Untyped, absolute: Untyped) -> Untyped:
    """The bits of elements of scores as signed integers; without the sign, if absolute."""
    width = vector.scalar.bitwidth
    scalar = types.Integer.from_bitwidth(width, signed=True)

    def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        word = _LLVM_SCALARS[scalar]
        wanted = builder.select(builder.trunc(args[1], ir.IntType(1)), word((1 << (width - 1)) - 1), word(-1))
        return builder.and_(builder.bitcast(args[0], llvm_vector(scalar)), splat(builder, wanted, LANES))

    return Vector(scalar)(vector, absolute), emit


@intrinsic
def from_bits(_typing: Untyped, words: Untyped, like: Untyped) -> Untyped:
    """Elements of scores, of the type of `like`, from their bits."""

    def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        return builder.bitcast(args[0], args[1].type)

    return like(words, like), emit


# --- whole vectors ----------------------------------------------------------------------------------------------------


@intrinsic
def bits(_typing: Untyped, vector: Untyped) -> Untyped:
    """A vector of booleans as one uint16, lane t in bit t."""

    def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        return builder.bitcast(args[0], ir.IntType(LANES))

    return types.uint16(vector), emit


@intrinsic
def from_mask(_typing: Untyped, number: Untyped) -> Untyped:
    """The low bits of a number as a vector of booleans: the way back of `bits`."""

    def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        return builder.bitcast(builder.trunc(args[0], ir.IntType(LANES)), llvm_vector(types.boolean))

    return Vector(types.boolean)(number), emit


@intrinsic
def where(_typing: Untyped, condition: Untyped, yes: Untyped, no: Untyped) -> Untyped:
    """Lane by lane: yes where the condition holds, else no."""

    def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        return builder.select(*args)

    return yes(condition, yes, no), emit


def _reduction(name: str) -> Untyped:
    @intrinsic
    def across(_typing: Untyped, vector: Untyped) -> Untyped:
        def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
            return call_llvm(builder, f"vector.reduce.{name}", args[0].type.element, args)

        return vector.scalar(vector), emit

    return across


smallest_of = _reduction("smin")  # of a vector of signed integers
largest_of = _reduction("smax")


@intrinsic
def sum_of(_typing: Untyped, vector: Untyped) -> Untyped:
    """The sum of the lanes; of floats, taken in their order."""

    def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        lanes = [builder.extract_element(args[0], ir.IntType(32)(t)) for t in range(LANES)]
        return reduce(builder.fadd if vector.scalar in _FLOATS else builder.add, lanes)

    return vector.scalar(vector), emit


@intrinsic
def first_bit(_typing: Untyped, number: Untyped) -> Untyped:
    """The place of the lowest 1 in a number that has one."""

    def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        return builder.zext(builder.cttz(args[0], ir.IntType(1)(1)), ir.IntType(64))

    return types.int64(number), emit


@intrinsic
def bit_count(_typing: Untyped, number: Untyped) -> Untyped:
    """How many bits are 1, of a number or lane by lane."""

    def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
        if isinstance(number, Vector):
            return call_llvm(builder, "ctpop", args[0].type, args)
        return builder.zext(builder.ctpop(args[0]), ir.IntType(64))

    return (number if isinstance(number, Vector) else types.int64)(number), emit


# --- arithmetic -------------------------------------------------------------------------------------------------------


def call_llvm(builder: Untyped, name: str, returns: Untyped, args: Untyped) -> Untyped:
    """Emit a call of the LLVM intrinsic `name` on vectors of integers."""
    vector = args[0].type
    full = f"llvm.{name}.v{vector.count}i{vector.element.width}"
    function = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
        builder.module, ir.FunctionType(returns, [vector] * len(args)), full
    )
    return builder.call(function, args)


def _either(integer: Callable[..., Any], floating: Callable[..., Any]) -> Callable[..., Any]:
    return lambda builder, a, b, scalar: (floating if scalar in _FLOATS else integer)(builder, a, b, scalar)


def _compare(sign: str) -> Callable[..., Any]:
    def signed(builder: Untyped, a: Untyped, b: Untyped, scalar: Untyped) -> Untyped:
        kind = builder.icmp_signed if getattr(scalar, "signed", False) else builder.icmp_unsigned
        return kind(sign, a, b)

    return _either(signed, lambda builder, a, b, _: builder.fcmp_ordered(sign, a, b))


def _instruction(name: str) -> Callable[..., Any]:
    return lambda builder, a, b, _: getattr(builder, name)(a, b)


def _same(scalar: Untyped) -> Untyped:
    return scalar


def _boolean(_scalar: Untyped) -> Untyped:
    return types.boolean


_OPERATORS: dict[Untyped, tuple[Callable[[Untyped], Any], Callable[..., Any]]] = {
    operator.add: (_same, _either(_instruction("add"), _instruction("fadd"))),
    operator.sub: (_same, _either(_instruction("sub"), _instruction("fsub"))),
    operator.mul: (_same, _either(_instruction("mul"), _instruction("fmul"))),
    operator.truediv: (_same, _instruction("fdiv")),
    operator.and_: (_same, _instruction("and_")),
    operator.or_: (_same, _instruction("or_")),
    operator.lshift: (_same, _instruction("shl")),
    operator.rshift: (_same, _instruction("ashr")),
    operator.gt: (_boolean, _compare(">")),
    operator.ge: (_boolean, _compare(">=")),
    operator.eq: (_boolean, _compare("==")),
    operator.ne: (_boolean, _compare("!=")),
}


def _binary(result: Callable[[Untyped], Any], instruction: Callable[..., Any]) -> Untyped:
    @intrinsic
    def apply(_typing: Untyped, a: Untyped, b: Untyped) -> Untyped:
        def emit(_context: Untyped, builder: Untyped, _signature: Untyped, args: Untyped) -> Untyped:
            return instruction(builder, *args, a.scalar)

        return Vector(result(a.scalar))(a, b), emit

    return apply


def _define(python: Untyped, function: Untyped) -> None:
    """Let `a python b` on two vectors of the same type be function(a, b)."""

    @overload(python)
    def choose(a: Untyped, b: Untyped) -> Untyped:
        def apply(a: Untyped, b: Untyped) -> Untyped:
            return function(a, b)

        return apply if isinstance(a, Vector) and a == b else None


for _python, _meaning in _OPERATORS.items():
    _define(_python, _binary(*_meaning))


def _extreme(name: str, sign: str) -> Untyped:
    def integer(builder: Untyped, a: Untyped, b: Untyped, _scalar: Untyped) -> Untyped:
        return call_llvm(builder, name, a.type, [a, b])

    def floating(builder: Untyped, a: Untyped, b: Untyped, _scalar: Untyped) -> Untyped:
        return builder.select(builder.fcmp_ordered(sign, a, b), a, b)

    return _binary(_same, _either(integer, floating))


larger = _extreme("smax", ">")  # lane by lane; of floats that are numbers, or signed integers
smaller = _extreme("smin", "<")
