"""What numba's Python lacks: bfloat16, arrays and functions by address, and arrays on the stack.

A bfloat16 is the upper half of a float32, so arrays of them are arrays of uint16 here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from parleyd.cpu_kernels.instructions import POWER_OF_TWO

# Sums may be taken in any order, so that they can be taken side by side. Infinity and NaN keep their meaning.
FAST = {"reassoc", "contract", "nsz", "arcp"}
_LINE_BYTES = 64
_INT32 = ir.IntType(32)


def _bitcast(to: Any, of: Any, llvm_type: ir.Type) -> Any:
    @intrinsic
    def cast(context, value):
        return to(of), lambda context, builder, signature, args: builder.bitcast(args[0], llvm_type)

    return cast


_float_of_bits = _bitcast(types.float32, types.uint32, ir.FloatType())
bits_of_float = _bitcast(types.uint32, types.float32, _INT32)


def _pointer_to(dtype: Any) -> Any:
    pointer = types.CPointer(dtype)

    @intrinsic
    def cast(context, address):
        def generate(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(pointer))

        return pointer(types.int64), generate

    return cast


_pointer_to_int8 = _pointer_to(types.int8)
_pointer_to_uint16 = _pointer_to(types.uint16)
_pointer_to_float32 = _pointer_to(types.float32)
_pointer_to_int32 = _pointer_to(types.int32)
_pointer_to_int64 = _pointer_to(types.int64)


@njit(forceinline=True)
def widened(bits):
    """The float32 of a bfloat16."""
    return _float_of_bits(types.uint32(bits) << types.uint32(16))


@njit(forceinline=True)
def rounded(value):
    """The nearest bfloat16 of a float32; between two, the even one."""
    bits = bits_of_float(value)
    return types.uint16(
        (bits + types.uint32(0x7FFF) + ((bits >> types.uint32(16)) & types.uint32(1))) >> types.uint32(16)
    )


@njit(forceinline=True, fastmath=FAST)
def power_of_two(exponent):
    """2 to a float32, what is below -126 or above 127 as if it were that; off by less than 2e-7 of it.

    A polynomial for 2**x on [0, 1), and the whole part as the exponent of a float32: unlike exp, this can be done for
    many numbers side by side.
    """
    exponent = min(max(exponent, np.float32(-126)), np.float32(127))
    whole = np.floor(exponent)
    part = exponent - whole
    power = np.float32(POWER_OF_TWO[0])
    for coefficient in POWER_OF_TWO[1:]:
        power = power * part + np.float32(coefficient)
    return power * _float_of_bits(types.uint32(types.int32(whole) + types.int32(127)) << types.uint32(23))


@njit(forceinline=True)
def float_argument(bits):
    """A float32 that came as `bits_of`."""
    return _float_of_bits(types.uint32(bits))


@njit(forceinline=True)
def bfloat16_array(address, shape):
    """What lies at an address, as bits."""
    return carray(_pointer_to_uint16(address), shape)


@njit(forceinline=True)
def int8_array(address, shape):
    """What lies at an address."""
    return carray(_pointer_to_int8(address), shape)


@njit(forceinline=True)
def float32_array(address, shape):
    """What lies at an address."""
    return carray(_pointer_to_float32(address), shape)


@njit(forceinline=True)
def int32_array(address, shape):
    """What lies at an address."""
    return carray(_pointer_to_int32(address), shape)


@njit(forceinline=True)
def int64_array(address, shape):
    """What lies at an address."""
    return carray(_pointer_to_int64(address), shape)


@intrinsic
def address_of(context, floats):
    """Of what `stack_floats` returned."""

    def generate(context, builder, signature, args):
        return builder.ptrtoint(args[0], ir.IntType(64))

    return types.int64(floats), generate


@intrinsic
def call(context, address, *arguments):
    """Calls a `threads.Function`."""
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * len(arguments))

    def generate(context, builder, signature, args):
        function = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(function, cgutils.unpack_tuple(builder, args[1]))
        return context.get_dummy_value()

    return types.void(address, types.UniTuple(types.int64, len(arguments))), generate


@intrinsic(prefer_literal=True)
def stack_floats(context, size):
    """So many float32, a constant number, that lie nowhere else: the compiler may keep them in registers."""

    def generate(context, builder, signature, args):
        with builder.goto_entry_block():
            floats = builder.alloca(ir.ArrayType(ir.FloatType(), size.literal_value))
            floats.align = _LINE_BYTES
        return builder.bitcast(floats, ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(size), generate
