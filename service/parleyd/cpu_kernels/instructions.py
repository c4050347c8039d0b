"""Vector instructions that no loop in Python compiles to, written as LLVM's own."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config
from numba.core import cgutils

LANES = 16  # of a register, 32 bits each
VECTOR_BYTES = 4 * LANES
TILE_ROWS = 16  # of a matrix unit's register, a vector each
TILE_BYTES = TILE_ROWS * VECTOR_BYTES

# Of a polynomial for 2**x on [0, 1), off by less than 2e-7 of it: the coefficients, that of the highest power first.
POWER_OF_TWO = (1.8775767e-3, 8.9893397e-3, 5.5826318e-2, 2.4015361e-1, 6.9315308e-1, 9.9999994e-1)

_NUM_TILES = 8
# Linux's system call for a process to ask for a processor's extension, and that of tiles' data.
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18

_BYTE, _SHORT, _LONG = ir.IntType(8), ir.IntType(16), ir.IntType(64)
_INT, _FLOAT = ir.IntType(32), ir.FloatType()
_INTS, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(_FLOAT, LANES)
_HALVES, _SHORTS = ir.VectorType(ir.HalfType(), LANES), ir.VectorType(_SHORT, LANES)
_SHORT_PAIRS = ir.VectorType(_SHORT, 2 * LANES)


def _has(*names: str) -> bool:
    return _features().issuperset(names)


@cache
def _features() -> frozenset[str]:
    """Of this processor, or of the one that numba is told to compile for."""
    if config.CPU_FEATURES is not None:
        return frozenset(name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+"))
    features = frozenset(name for name, is_there in llvm.get_host_cpu_features().items() if is_there)
    # Numba does without them where the processor's name says that it cannot have them, as in some virtual machines.
    return features if config.ENABLE_AVX else frozenset(name for name in features if not name.startswith("avx"))


def has_vectors() -> bool:
    """Whether this processor has what an Emitter emits: x86 servers have had it for ten years."""
    return _has("avx2", "fma", "f16c")


def has_bytes() -> bool:
    """Whether `add_products_of_bytes` is an instruction here."""
    return _has("avx512vnni")


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16."""
    return _has("avx512bf16")


def has_many_registers() -> bool:
    """Whether this processor has 32 registers of LANES, and not 16 of half of them."""
    return _has("avx512f")


@cache
def has_matrix_unit() -> bool:
    """Whether this processor has tiles of bfloat16 (AMX), and this process may use them."""
    if not (_has("amx-bf16") and has_bfloat16() and sys.platform == "linux"):
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0)


class Emitter:
    """Appends to a function. Addresses and counts are its int64 values; vectors have LANES numbers of 32 bits."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def at(self, address: Any, index: Any, num_bytes: Any = 1) -> Any:
        """`address + index * num_bytes`."""
        index, num_bytes = (address.type(value) if isinstance(value, int) else value for value in (index, num_bytes))
        return self._builder.add(address, self._builder.mul(index, num_bytes))

    def prefetch(self, address: Any) -> None:
        """Has a line of memory brought into the second-level cache, while we go on."""
        builder, byte = self._builder, _BYTE.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _INT, _INT, _INT])
        function = builder.module.declare_intrinsic("llvm.prefetch", (byte,), kind)
        builder.call(function, [builder.inttoptr(address, byte), *map(_INT, (0, 2, 1))])  # to read, into L2, data

    def load_ints(self, address: Any) -> Any:
        return self._load(address, _INTS)

    def load_halves_of_ints(self, address: Any, num_bytes: int) -> Any:
        """Half a vector from there, and half from so many bytes behind."""
        kind = ir.VectorType(_INT, LANES // 2)
        return self._shuffled(self._load(address, kind), self._load(self.at(address, num_bytes), kind), [*range(LANES)])

    def load_halves(self, address: Any) -> Any:
        """LANES float16, as float32."""
        return self._builder.fpext(self._load(address, _HALVES), _FLOATS)

    def load_bfloat16(self, address: Any) -> Any:
        """LANES bfloat16, as float32."""
        bits = self._builder.zext(self._load(address, _SHORTS), _INTS)
        return self._builder.bitcast(self._builder.shl(bits, self.ints(16)), _FLOATS)

    def repeat(self, value: Any) -> Any:
        """In all lanes."""
        undefined = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
        first = self._builder.insert_element(undefined, value, _INT(0))
        return self._builder.shuffle_vector(first, undefined, self.ints(0))

    def repeat_int(self, address: Any) -> Any:
        """What lies there, in all lanes."""
        return self.repeat(self._load(address, _INT))

    def repeat_float(self, address: Any) -> Any:
        """What lies there, in all lanes."""
        return self.repeat(self._load(address, _FLOAT))

    def ints(self, value: int) -> Any:
        """A constant in all lanes."""
        return ir.Constant(_INTS, [value] * LANES)

    def floats(self, value: float) -> Any:
        """A constant in all lanes."""
        return ir.Constant(_FLOATS, [value] * LANES)

    def to_floats(self, ints: Any) -> Any:
        return self._builder.sitofp(ints, _FLOATS)

    def nibbles(self, vector: Any) -> tuple[Any, Any]:
        """The low and the high halves of all bytes."""
        low = self.ints(0x0F0F0F0F)
        return self._builder.and_(vector, low), self._builder.and_(self._builder.lshr(vector, self.ints(4)), low)

    def add(self, one: Any, other: Any) -> Any:
        return self._builder.fadd(one, other)

    def subtract(self, one: Any, other: Any) -> Any:
        return self._builder.fsub(one, other)

    def multiply(self, one: Any, other: Any) -> Any:
        return self._builder.fmul(one, other)

    def add_product(self, sums: Any, one: Any, other: Any) -> Any:
        """To each float32, the product of two, rounded once where this processor can."""
        flags = ("contract",)
        return self._builder.fadd(sums, self._builder.fmul(one, other, flags=flags), flags=flags)

    def no_products_of_bytes(self) -> Any:
        """The sums that `add_products_of_bytes` begins with."""
        return self.ints(0) if has_bytes() else ir.Constant(_SHORT_PAIRS, [0] * (2 * LANES))

    def add_products_of_bytes(self, sums: Any, unsigned: Any, signed: Any) -> Any:
        """To each lane's sum, the four products of bytes in it. Without `has_bytes` a sum is in two int16: the caller
        sees to it that neither overflows."""
        if has_bytes():
            return self._call("llvm.x86.avx512.vpdpbusd.512", _INTS, sums, unsigned, signed)
        products = self._by_halves("llvm.x86.avx2.pmadd.ub.sw", _SHORTS, (unsigned, signed), _BYTE)
        return self._builder.add(sums, products)

    def whole_sums(self, sums: Any) -> Any:
        """What `add_products_of_bytes` has added, as int32."""
        if has_bytes():
            return sums
        ones = ir.Constant(_SHORT_PAIRS, [1] * (2 * LANES))
        return self._by_halves("llvm.x86.avx2.pmadd.wd", ir.VectorType(_INT, LANES // 2), (sums, ones), _SHORT)

    def add_16_times(self, one: Any, other: Any) -> Any:
        """To each int32, 16 times another."""
        return self._builder.add(one, self._builder.shl(other, self.ints(4)))

    def power_of_two(self, exponents: Any) -> Any:
        """2 to each float32, as `numbers.power_of_two`, but below -126 on to 0; only where `has_bfloat16`."""
        whole = self._call("llvm.floor.v16f32", _FLOATS, exponents)
        part = self._builder.fsub(exponents, whole)
        power = self.floats(POWER_OF_TWO[0])
        for coefficient in POWER_OF_TWO[1:]:
            power = self.add_product(self.floats(coefficient), power, part)
        current_rounding = _INT(4)
        return self._call(
            "llvm.x86.avx512.mask.scalef.ps.512", _FLOATS, power, whole, power, _SHORT(-1), current_rounding
        )

    def first(self, count: Any, floats: Any, other: float) -> Any:
        """The first `count` of a vector's numbers, and `other` in their neighbours' place."""
        lanes = ir.Constant(_INTS, list(range(LANES)))
        is_first = self._builder.icmp_signed("<", lanes, self.repeat(self._builder.trunc(count, _INT)))
        return self._builder.select(is_first, floats, self.floats(other))

    def larger(self, ones: Any, others: Any) -> Any:
        """Of each two float32; where the first is NaN, the second."""
        return self._builder.select(self._builder.fcmp_ordered(">", ones, others), ones, others)

    def folded(self, floats: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """One number of all of a vector's."""
        size = LANES // 2
        while size:
            moved = self._shuffled(floats, floats, [(lane + size) % LANES for lane in range(LANES)])
            floats, size = combine(floats, moved), size // 2
        return self._builder.extract_element(floats, _INT(0))

    def add_products_of_bfloat16(self, sums: Any, one: Any, other: Any) -> Any:
        """To each float32, the two products of bfloat16 in its lanes; only where `has_bfloat16`."""
        return self._call("llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, sums, one, other)

    def widened(self, pairs: Any) -> list[Any]:
        """The first bfloat16 of each lane, and the second, as float32."""
        builder = self._builder
        halves = builder.shl(pairs, self.ints(16)), builder.and_(pairs, self.ints(-(2**16)))
        return [builder.bitcast(half, _FLOATS) for half in halves]

    def transposed(self, vectors: list[Any]) -> list[Any]:
        """LANES vectors, each of the same lane of all; of half as many, each half of a vector is one for itself."""
        lanes, size = range(LANES), len(vectors) // 2
        # Each round swaps the half of one vector for the other half of another.
        while size:
            for index in (index for index in range(len(vectors)) if not index & size):
                one, other = vectors[index], vectors[index | size]
                low = [LANES + (lane ^ size) if lane & size else lane for lane in lanes]
                high = [LANES + lane if lane & size else lane | size for lane in lanes]
                vectors[index] = self._shuffled(one, other, low)
                vectors[index | size] = self._shuffled(one, other, high)
            size //= 2
        return vectors

    def interleaved(self, one: Any, other: Any) -> tuple[Any, Any]:
        """The bfloat16 of two vectors in turn: the first half of each, and the second."""
        pairs = [number for index in range(2 * LANES) for number in (index, index + 2 * LANES)]
        halves = (pairs[: 2 * LANES], pairs[2 * LANES :])
        one, other = (self._builder.bitcast(vector, ir.VectorType(_SHORT, 2 * LANES)) for vector in (one, other))
        low, high = (self._builder.bitcast(self._shuffled(one, other, half), _INTS) for half in halves)
        return low, high

    def sums(
        self, num_sums: int, count: Any, body: Callable[[Any, list[Any]], list[Any]], start: Any = None
    ) -> list[Any]:
        """So many vectors of float32, from `start` or 0, that `body(index, sums)` adds to for each index below `count`,
        which is not 0."""
        builder, before = self._builder, self._builder.block
        loop, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        index, sums = builder.phi(count.type), [builder.phi(_FLOATS) for _ in range(num_sums)]
        added = body(index, list(sums))
        following = builder.add(index, count.type(1))
        index.add_incoming(count.type(0), before)
        index.add_incoming(following, loop)
        for phi, added_to in zip(sums, added, strict=True):
            phi.add_incoming(self.floats(0.0) if start is None else start, before)
            phi.add_incoming(added_to, loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
        builder.position_at_end(after)
        return added

    def store_ints(self, address: Any, ints: Any) -> None:
        self._builder.store(ints, self._builder.inttoptr(address, _INTS.as_pointer()), align=4)

    def store(self, address: Any, floats: Any) -> None:
        self._builder.store(floats, self._builder.inttoptr(address, _FLOATS.as_pointer()), align=4)

    def load_floats(self, address: Any) -> Any:
        return self._load(address, _FLOATS)

    def store_bfloat16(self, address: Any, floats: Any) -> None:
        """Each rounded to the nearest; between two, to the even one."""
        pointer = self._builder.inttoptr(address, _SHORTS.as_pointer())
        self._builder.store(self._rounded(floats), pointer, align=2)

    def room(self, num_bytes: int) -> Any:
        """The address of so many bytes on the stack."""
        with self._builder.goto_entry_block():
            room = self._builder.alloca(ir.ArrayType(_BYTE, num_bytes))
            room.align = VECTOR_BYTES
        return self._builder.ptrtoint(room, _LONG)

    def configure_tiles(self, num_rows: Any, full: tuple[int, ...]) -> None:
        """Tiles of so many rows, at most TILE_ROWS; those in `full` have them all."""
        config = self.room(VECTOR_BYTES)
        self.store_ints(config, self.ints(0))
        self._put(config, 0, _BYTE(1))  # the kind of tiles
        for tile in range(_NUM_TILES):
            self._put(config, 16 + 2 * tile, _SHORT(VECTOR_BYTES))
            self._put(config, 48 + tile, _BYTE(TILE_ROWS) if tile in full else self._builder.trunc(num_rows, _BYTE))
        self._call("llvm.x86.ldtilecfg", ir.VoidType(), self._pointer(config))

    def release_tiles(self) -> None:
        """Else 8 KiB more are to be saved whenever another thread takes the processor."""
        self._call("llvm.x86.tilerelease", ir.VoidType())

    def clear_tile(self, tile: int) -> None:
        self._call("llvm.x86.tilezero", ir.VoidType(), _BYTE(tile))

    def load_tile(self, tile: int, address: Any, row_bytes: Any) -> None:
        """Its rows, so many bytes from each to the next."""
        self._call("llvm.x86.tileloadd64", ir.VoidType(), _BYTE(tile), self._pointer(address), row_bytes)

    def store_tile(self, tile: int, address: Any) -> None:
        """Its rows, one after the other."""
        self._call("llvm.x86.tilestored64", ir.VoidType(), _BYTE(tile), self._pointer(address), _LONG(VECTOR_BYTES))

    def add_products_of_tiles(self, sums: int, rows: int, columns: int) -> None:
        """Of bfloat16, to sums in float32. `columns`: two numbers of a column side by side, as for vectors."""
        self._call("llvm.x86.tdpbf16ps", ir.VoidType(), _BYTE(sums), _BYTE(rows), _BYTE(columns))

    def _rounded(self, floats: Any) -> Any:
        if has_bfloat16():
            return self._call("llvm.x86.avx512bf16.cvtneps2bf16.512", _SHORTS, floats)
        builder = self._builder
        bits = builder.bitcast(floats, _INTS)
        is_odd = builder.and_(builder.lshr(bits, self.ints(16)), self.ints(1))
        rounded = builder.lshr(builder.add(builder.add(bits, self.ints(0x7FFF)), is_odd), self.ints(16))
        return builder.trunc(rounded, _SHORTS)

    def _put(self, address: Any, offset: int, value: Any) -> None:
        self._builder.store(value, self._builder.inttoptr(self.at(address, offset), value.type.as_pointer()), align=1)

    def _pointer(self, address: Any) -> Any:
        return self._builder.inttoptr(address, _BYTE.as_pointer())

    def _load(self, address: Any, kind: ir.Type) -> Any:
        return self._builder.load(self._builder.inttoptr(address, kind.as_pointer()), align=1)

    def _shuffled(self, one: Any, other: Any, lanes: list[int]) -> Any:
        return self._builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(_INT, len(lanes)), lanes))

    def _by_halves(self, name: str, result: ir.Type, vectors: tuple[Any, Any], kind: ir.Type) -> Any:
        """An instruction for vectors half as long, of numbers of that kind, on both halves."""
        num = VECTOR_BYTES * 8 // kind.width
        cast = [self._builder.bitcast(vector, ir.VectorType(kind, num)) for vector in vectors]
        low, high = (
            self._call(name, result, *(self._shuffled(one, one, lanes) for one in cast))
            for lanes in (list(range(num // 2)), list(range(num // 2, num)))
        )
        return self._shuffled(low, high, list(range(2 * result.count)))

    def _call(self, name: str, result: ir.Type, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self._builder.call(cgutils.get_or_insert_function(self._builder.module, kind, name), arguments)
