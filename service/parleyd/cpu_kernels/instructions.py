"""Vector instructions that no loop in Python compiles to, written as LLVM's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 16  # of a register, 32 bits each
VECTOR_BYTES = 4 * LANES

_INT, _FLOAT = ir.IntType(32), ir.FloatType()
_INTS, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(_FLOAT, LANES)
_HALVES, _SHORTS = ir.VectorType(ir.HalfType(), LANES), ir.VectorType(ir.IntType(16), LANES)


class Emitter:
    """Appends to a function. Addresses and counts are its int64 values; vectors have LANES numbers of 32 bits."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def at(self, address: Any, index: Any, num_bytes: Any = 1) -> Any:
        """`address + index * num_bytes`."""
        index, num_bytes = (address.type(value) if isinstance(value, int) else value for value in (index, num_bytes))
        return self._builder.add(address, self._builder.mul(index, num_bytes))

    def load_ints(self, address: Any) -> Any:
        return self._load(address, _INTS)

    def load_halves(self, address: Any) -> Any:
        """LANES float16, as float32."""
        return self._builder.fpext(self._load(address, _HALVES), _FLOATS)

    def repeat_int(self, address: Any) -> Any:
        """What lies there, in all lanes."""
        return self._repeated(self._load(address, _INT))

    def repeat_float(self, address: Any) -> Any:
        """What lies there, in all lanes."""
        return self._repeated(self._load(address, _FLOAT))

    def ints(self, value: int) -> Any:
        """A constant in all lanes."""
        return ir.Constant(_INTS, [value] * LANES)

    def to_floats(self, ints: Any) -> Any:
        return self._builder.sitofp(ints, _FLOATS)

    def nibbles(self, vector: Any) -> tuple[Any, Any]:
        """The low and the high halves of all bytes."""
        low = self.ints(0x0F0F0F0F)
        return self._builder.and_(vector, low), self._builder.and_(self._builder.lshr(vector, self.ints(4)), low)

    def multiply(self, one: Any, other: Any) -> Any:
        return self._builder.fmul(one, other)

    def add_product(self, sums: Any, one: Any, other: Any) -> Any:
        """To each float32, the product of two."""
        return self._call("llvm.fma.v16f32", _FLOATS, one, other, sums)

    def add_products_of_bytes(self, sums: Any, unsigned: Any, signed: Any) -> Any:
        """To each int32, the four products of bytes in its lanes. AVX-512 VNNI."""
        return self._call("llvm.x86.avx512.vpdpbusd.512", _INTS, sums, unsigned, signed)

    def add_products_of_bfloat16(self, sums: Any, one: Any, other: Any) -> Any:
        """To each float32, the two products of bfloat16 in its lanes. AVX-512 BF16."""
        return self._call("llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, sums, one, other)

    def sums(self, num_sums: int, count: Any, body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """So many vectors of float32, from 0, that `body(index, sums)` adds to for each index below `count`, which is
        not 0."""
        builder, before = self._builder, self._builder.block
        loop, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        index, sums = builder.phi(count.type), [builder.phi(_FLOATS) for _ in range(num_sums)]
        added = body(index, list(sums))
        following = builder.add(index, count.type(1))
        nothing = ir.Constant(_FLOATS, [0.0] * LANES)
        index.add_incoming(count.type(0), before)
        index.add_incoming(following, loop)
        for phi, added_to in zip(sums, added, strict=True):
            phi.add_incoming(nothing, before)
            phi.add_incoming(added_to, loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
        builder.position_at_end(after)
        return added

    def store_bfloat16(self, address: Any, floats: Any) -> None:
        """Each rounded to the nearest; between two, to the even one."""
        builder = self._builder
        bits = builder.bitcast(floats, _INTS)
        is_odd = builder.and_(builder.lshr(bits, self.ints(16)), self.ints(1))
        rounded = builder.lshr(builder.add(builder.add(bits, self.ints(0x7FFF)), is_odd), self.ints(16))
        pointer = builder.inttoptr(address, _SHORTS.as_pointer())
        builder.store(builder.trunc(rounded, _SHORTS), pointer, align=2)

    def _load(self, address: Any, kind: ir.Type) -> Any:
        return self._builder.load(self._builder.inttoptr(address, kind.as_pointer()), align=1)

    def _repeated(self, value: Any) -> Any:
        undefined = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
        first = self._builder.insert_element(undefined, value, _INT(0))
        return self._builder.shuffle_vector(first, undefined, self.ints(0))

    def _call(self, name: str, result: ir.Type, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self._builder.call(cgutils.get_or_insert_function(self._builder.module, kind, name), arguments)
