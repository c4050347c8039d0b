"""The innermost loops of a matrix product: LANES columns of it, all rows, a tile of up to eight rows at a time.

Each tile brings the weights of the LANES columns after these nearer while it computes: the processor by itself is late.
Whatever the tile, a row's sums are taken in the same order: they do not depend on how many rows there are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from parleyd.cpu_kernels.instructions import LANES, VECTOR_BYTES, Emitter

BLOCK_SIZE = 32  # weights of a row that share a scale and a minimum
SCALES_BYTES = 2 * 2 * LANES  # of LANES blocks, float16
# In bfloat16, the columns of the weights that a turn of the loop takes.
UNROLLED_INS = 8

_MAX_ROWS = 8


@njit
def block_bytes(num_bits):
    """Of LANES blocks."""
    return SCALES_BYTES + LANES * BLOCK_SIZE * num_bits // 8


class _Operands(NamedTuple):
    """Of `multiply_rows`, int64 values of the function that calls it."""

    weights: Any
    x: Any
    scales: Any
    num_ins: Any
    num_rows: Any
    product: Any
    product_stride: Any


@intrinsic(prefer_literal=True)
def multiply_rows(context, num_bits, weights, x, scales, num_ins, num_rows, product, product_stride):
    """Rows times LANES columns. `num_bits`: of a weight, a constant; 4 and 8 are whole numbers, 16 bfloat16.

    Addresses: `weights`: as `products.pack…` lays them out; `x`: `[rows, in]`, bfloat16 for those weights, else int8;
    `scales`: of int8, float32 `[2, rows, in / BLOCK_SIZE]`: each block's, and the same times the block's sum;
    `product`: where the first row's LANES columns belong, bfloat16, with `product_stride` bytes to the next row's.
    """
    bits = num_bits.literal_value

    def generate(context, builder, signature, args):
        _Product(builder, bits, _Operands(*args[1:])).emit()
        return context.get_dummy_value()

    return types.void(num_bits, *[types.int64] * len(_Operands._fields)), generate


class _Product:
    """Emits the loops over tiles and columns."""

    def __init__(self, builder: Any, num_bits: int, operands: _Operands) -> None:
        self._builder = builder
        self._emit = Emitter(builder)
        self._num_bits = num_bits
        self._operands = operands

    def emit(self) -> None:
        """Tiles of the most rows, then those that are left, as a sum of powers of two."""
        builder, num_rows = self._builder, self._operands.num_rows
        kind, size = num_rows.type, _MAX_ROWS
        with cgutils.for_range(builder, builder.udiv(num_rows, kind(size))) as tiles:
            self._tile(builder.mul(tiles.index, kind(size)), size)
        while size := size // 2:
            with builder.if_then(builder.icmp_unsigned("!=", builder.and_(num_rows, kind(size)), kind(0))):
                self._tile(builder.and_(num_rows, kind(-2 * size)), size)

    def _tile(self, first_row: Any, size: int) -> None:
        rows = [self._builder.add(first_row, first_row.type(index)) for index in range(size)]
        products = (self._bfloat16 if self._num_bits == 16 else self._blocks)(rows)
        for row, sums in zip(rows, products, strict=True):
            self._emit.store_bfloat16(self._emit.at(self._operands.product, row, self._operands.product_stride), sums)

    def _bfloat16(self, rows: list[Any]) -> list[Any]:
        emit, builder, operands = self._emit, self._builder, self._operands
        row_bytes = builder.mul(operands.num_ins, operands.num_ins.type(2))
        inputs = [emit.at(operands.x, row, row_bytes) for row in rows]

        def add(index: Any, sums: list[Any]) -> list[Any]:
            weights = emit.at(operands.weights, index, UNROLLED_INS // 2 * VECTOR_BYTES)
            for pair in range(UNROLLED_INS // 2):
                emit.prefetch(emit.at(emit.at(weights, pair, VECTOR_BYTES), operands.num_ins, 2 * LANES))
                columns = emit.load_ints(emit.at(weights, pair, VECTOR_BYTES))
                for row, address in enumerate(inputs):
                    x = emit.repeat_int(emit.at(emit.at(address, index, 2 * UNROLLED_INS), 4 * pair))
                    sums[row] = emit.add_products_of_bfloat16(sums[row], columns, x)
            return sums

        return emit.sums(len(rows), builder.udiv(operands.num_ins, operands.num_ins.type(UNROLLED_INS)), add)

    def _blocks(self, rows: list[Any]) -> list[Any]:
        emit, builder, operands = self._emit, self._builder, self._operands
        num_blocks = builder.udiv(operands.num_ins, operands.num_ins.type(BLOCK_SIZE))
        scaled_sums = emit.at(operands.scales, builder.mul(operands.num_rows, num_blocks), 4)

        def add(index: Any, sums: list[Any]) -> list[Any]:
            num_bytes = block_bytes.py_func(self._num_bits)
            weights = emit.at(operands.weights, index, num_bytes)
            for line in range(num_bytes // VECTOR_BYTES):
                emit.prefetch(emit.at(emit.at(weights, line, VECTOR_BYTES), num_blocks, num_bytes))
            scales, minima = emit.load_halves(weights), emit.load_halves(emit.at(weights, SCALES_BYTES // 2))
            numbers = self._numbers(emit.at(weights, SCALES_BYTES))
            for place, row in enumerate(rows):
                block = builder.add(index, builder.mul(row, num_blocks))
                dot = emit.ints(0)
                for quad, vector in enumerate(numbers):
                    codes = emit.repeat_int(emit.at(emit.at(operands.x, block, BLOCK_SIZE), 4 * quad))
                    dot = emit.add_products_of_bytes(dot, vector, codes)
                scale = emit.multiply(scales, emit.repeat_float(emit.at(operands.scales, block, 4)))
                total = emit.add_product(sums[place], emit.to_floats(dot), scale)
                sums[place] = emit.add_product(total, minima, emit.repeat_float(emit.at(scaled_sums, block, 4)))
            return sums

        return emit.sums(len(rows), num_blocks, add)

    def _numbers(self, address: Any) -> list[Any]:
        """A block's: for each four columns a vector."""
        emit = self._emit
        num_vectors = BLOCK_SIZE // 4 * self._num_bits // 8
        vectors = [emit.load_ints(emit.at(address, index, VECTOR_BYTES)) for index in range(num_vectors)]
        if self._num_bits == 8:
            return vectors
        low, high = zip(*map(emit.nibbles, vectors), strict=True)
        return [*low, *high]
