"""The innermost loops of a matrix product: LANES or twice as many columns of it, a tile of up to eight rows at a time.

Each tile brings the weights of the columns after these nearer while it computes: the processor by itself is late.
Whatever the tile, a row's sums are taken in the same order: they do not depend on how many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from parleyd.cpu_kernels.instructions import LANES, VECTOR_BYTES, Emitter, has_bytes, has_many_registers

BLOCK_SIZE = 32  # weights of a row that share a scale and a minimum
SCALES_BYTES = 2 * 2 * LANES  # of LANES blocks, float16
# In bfloat16, the columns of the weights that a turn of the loop takes.
UNROLLED_INS = 8

_MAX_ROWS = 8 if has_many_registers() else 4
# From so many rows on, of two tiles or more, it is the processor and not memory that takes the time, and two groups of
# columns side by side keep it busier: eight sums alone would wait for each other's additions.
_MIN_ROWS_OF_PAIRS = _MAX_ROWS + 1


@njit
def block_bytes(num_bits):
    """Of LANES blocks."""
    return SCALES_BYTES + LANES * BLOCK_SIZE * num_bits // 8


@intrinsic
def largest_of_block(context, numbers):
    """The largest magnitude of BLOCK_SIZE bfloat16 at an address; NaN where one of them is."""

    def generate(context, builder, signature, args):
        emit = Emitter(builder)

        def larger(ones, others):  # by their bits, of which those of NaN are the largest
            return builder.select(builder.icmp_unsigned(">", ones, others), ones, others)

        vectors = [emit.load_bfloat16(emit.at(args[0], part, 2 * LANES)) for part in range(BLOCK_SIZE // LANES)]
        bits = [builder.bitcast(vector, emit.ints(0).type) for vector in vectors]
        magnitudes = [builder.and_(one, emit.ints(0x7FFFFFFF)) for one in bits]
        largest = emit.folded(reduce(larger, magnitudes), larger)
        return builder.bitcast(largest, context.get_value_type(types.float32))

    return types.float32(types.int64), generate


class _Operands(NamedTuple):
    """Of `multiply_rows`, int64 values of the function that calls it."""

    num_groups: Any
    weights: Any
    x: Any
    scales: Any
    num_ins: Any
    num_rows: Any
    product: Any
    product_stride: Any


@intrinsic(prefer_literal=True)
def multiply_rows(
    context, num_bits, x_bits, num_groups, weights, x, scales, num_ins, num_rows, product, product_stride
):  # fmt: skip
    """Rows times groups of LANES columns. Constants: `num_bits`, of a weight: 4 and 8 are whole numbers, 16 bfloat16;
    `x_bits`: 16 is bfloat16 and 32 float32, both for weights in bfloat16, and 8 int8, for others.

    Addresses: `weights`: as `products.pack…` lays them out; `x`: `[rows, in]`;
    `scales`: of int8, float32 `[2, rows, in / BLOCK_SIZE]`: each block's, and the same times the block's sum;
    `product`: where the first row's columns belong, bfloat16, with `product_stride` bytes to the next row's.
    """
    bits = num_bits.literal_value, x_bits.literal_value

    def generate(context, builder, signature, args):
        _Product(builder, *bits, _Operands(*args[2:])).emit()
        return context.get_dummy_value()

    return types.void(num_bits, x_bits, *[types.int64] * len(_Operands._fields)), generate


class _Product:
    """Emits the loops over columns and tiles. A tile's sums are in order of its rows, then of its groups of columns."""

    def __init__(self, builder: Any, num_bits: int, x_bits: int, operands: _Operands) -> None:
        self._builder = builder
        self._emit = Emitter(builder)
        self._num_bits = num_bits
        self._x_bytes = x_bits // 8
        self._operands = operands
        num_ins = operands.num_ins
        self._num_blocks = builder.udiv(num_ins, num_ins.type(BLOCK_SIZE))
        zero = num_ins.type(0)
        if num_bits == 16:
            self._group_bytes = self._emit.at(zero, num_ins, 2 * LANES)
        else:
            self._group_bytes = self._emit.at(zero, self._num_blocks, block_bytes.py_func(num_bits))

    def emit(self) -> None:
        """Pairs of groups where there are enough rows, then what is left, one by one."""
        builder, num_groups, num_rows = self._builder, self._operands.num_groups, self._operands.num_rows
        kind, num_paired = num_rows.type, num_rows.type(0)
        if has_many_registers():
            # Inputs in float32 are not widened anew for each group, so there it pays for few rows too.
            least = 0 if self._x_bytes == 4 else _MIN_ROWS_OF_PAIRS
            has_pairs = builder.icmp_unsigned(">=", num_rows, kind(least))
            num_paired = builder.select(has_pairs, builder.and_(num_groups, kind(-2)), num_paired)
            self._groups(kind(0), num_paired, 2)
        self._groups(num_paired, num_groups, 1)

    def _groups(self, start: Any, end: Any, width: int) -> None:
        builder = self._builder
        with cgutils.for_range_slice(builder, start, end, start.type(width)) as (group, _):
            self._columns([builder.add(group, start.type(index)) for index in range(width)])

    def _columns(self, groups: list[Any]) -> None:
        """Tiles of the most rows, then one of those that are left."""
        builder, num_rows = self._builder, self._operands.num_rows
        kind = num_rows.type
        num_tiles = builder.udiv(num_rows, kind(_MAX_ROWS))
        with cgutils.for_range(builder, num_tiles) as tiles:
            self._tile(groups, builder.mul(tiles.index, kind(_MAX_ROWS)), _MAX_ROWS)
        first = builder.mul(num_tiles, kind(_MAX_ROWS))
        for size in range(1, _MAX_ROWS):
            with builder.if_then(builder.icmp_unsigned("==", builder.sub(num_rows, first), kind(size))):
                self._tile(groups, first, size)

    def _tile(self, groups: list[Any], first_row: Any, size: int) -> None:
        emit, operands = self._emit, self._operands
        rows = [self._builder.add(first_row, first_row.type(index)) for index in range(size)]
        weights = [emit.at(operands.weights, group, self._group_bytes) for group in groups]
        sums = iter((self._bfloat16 if self._num_bits == 16 else self._blocks)(weights, rows))
        for row in rows:
            for group in groups:
                columns = emit.at(operands.product, group, 2 * LANES)
                emit.store_bfloat16(emit.at(columns, row, operands.product_stride), next(sums))

    def _bfloat16(self, weights: list[Any], rows: list[Any]) -> list[Any]:
        emit, builder, operands = self._emit, self._builder, self._operands
        row_bytes = builder.mul(operands.num_ins, operands.num_ins.type(self._x_bytes))
        inputs = [emit.at(operands.x, row, row_bytes) for row in rows]

        def add(index: Any, sums: list[Any]) -> list[Any]:
            here = [emit.at(address, index, UNROLLED_INS // 2 * VECTOR_BYTES) for address in weights]
            x = [emit.at(row, index, UNROLLED_INS * self._x_bytes) for row in inputs]
            for pair in range(UNROLLED_INS // 2):
                columns = self._lines(here, pair)
                if self._x_bytes == 2:
                    sums = self._added(emit.add_products_of_bfloat16, sums, columns, x, 4 * pair, emit.repeat_int)
                    continue
                for number, halves in enumerate(zip(*map(emit.widened, columns), strict=True)):
                    place = 4 * (2 * pair + number)
                    sums = self._added(emit.add_product, sums, halves, x, place, emit.repeat_float)
            return sums

        num_turns = builder.udiv(operands.num_ins, operands.num_ins.type(UNROLLED_INS))
        return emit.sums(len(rows) * len(weights), num_turns, add)

    def _added(
        self, add: Callable[[Any, Any, Any], Any], sums: list[Any], columns: Sequence[Any], rows: list[Any], place: int,
        repeat: Callable[[Any], Any],
    ) -> list[Any]:  # fmt: skip
        """To each row's sum of each group's columns, the product with what is at a place of the row."""
        # Each is used as soon as it is repeated: repeating all of them first takes half as long again.
        x, earlier = (repeat(self._emit.at(row, place)) for row in rows), iter(sums)
        return [add(next(earlier), column, one) for one in x for column in columns]

    def _blocks(self, weights: list[Any], rows: list[Any]) -> list[Any]:
        emit, builder, operands = self._emit, self._builder, self._operands
        num_bytes = block_bytes.py_func(self._num_bits)
        scaled_sums = emit.at(operands.scales, builder.mul(operands.num_rows, self._num_blocks), 4)

        def add(index: Any, sums: list[Any]) -> list[Any]:
            here = [emit.at(address, index, num_bytes) for address in weights]
            blocks = [builder.add(index, builder.mul(row, self._num_blocks)) for row in rows]
            dots = self._dots(here, blocks)
            of_columns = [[emit.load_halves(emit.at(one, place)) for place in (0, SCALES_BYTES // 2)] for one in here]
            dot, earlier = iter(dots), iter(sums)
            added = []
            for block in blocks:
                row_scale, row_sum = (
                    emit.repeat_float(emit.at(one, block, 4)) for one in (operands.scales, scaled_sums)
                )
                for scale, minimum in of_columns:
                    whole = emit.to_floats(next(dot))
                    total = emit.add_product(next(earlier), whole, emit.multiply(scale, row_scale))
                    added.append(emit.add_product(total, minimum, row_sum))
            return added

        return emit.sums(len(rows) * len(weights), self._num_blocks, add)

    def _dots(self, weights: list[Any], blocks: list[Any]) -> list[Any]:
        """Of a block of each row and one of each group's columns, in whole numbers."""
        emit = self._emit
        self._prefetch(weights, 0)  # the scales
        if self._num_bits == 4:
            return self._sums(weights, blocks, emit.nibbles)
        if has_bytes():
            return self._sums(weights, blocks, lambda vector: (vector,))
        # A block's sums of whole bytes would be too large.
        low = self._sums(weights, blocks, lambda vector: emit.nibbles(vector)[:1])
        high = self._sums(weights, blocks, lambda vector: emit.nibbles(vector)[1:])
        return [emit.add_16_times(one, other) for one, other in zip(low, high, strict=True)]

    def _sums(self, weights: list[Any], blocks: list[Any], parts: Callable[[Any], Sequence[Any]]) -> list[Any]:
        """Of products of `parts` of a vector, four columns in each lane: the first of all, then the second."""
        emit, operands = self._emit, self._operands
        sums = [emit.no_products_of_bytes()] * (len(blocks) * len(weights))
        codes = [emit.at(operands.x, block, BLOCK_SIZE) for block in blocks]
        num_lines = BLOCK_SIZE // 4 * self._num_bits // 8
        for line in range(num_lines):
            vectors = self._lines(weights, SCALES_BYTES // VECTOR_BYTES + line)
            for part, columns in enumerate(zip(*map(parts, vectors), strict=True)):
                place = 4 * (line + part * num_lines)
                sums = self._added(emit.add_products_of_bytes, sums, columns, codes, place, emit.repeat_int)
        return [emit.whole_sums(one) for one in sums]

    def _lines(self, weights: list[Any], index: int) -> list[Any]:
        """A vector of each group's weights; brings nearer those of the groups after these."""
        self._prefetch(weights, index)
        return [self._emit.load_ints(self._emit.at(address, index, VECTOR_BYTES)) for address in weights]

    def _prefetch(self, weights: list[Any], index: int) -> None:
        emit = self._emit
        for address in weights:
            emit.prefetch(emit.at(emit.at(address, index, VECTOR_BYTES), len(weights), self._group_bytes))
