"""The innermost loops of a matrix product on a processor's matrix unit (AMX): up to 16 rows by LANES columns.

In bfloat16, with weights as `tiles.py` takes them. A row's sums are taken in the same order however many rows there
are: where too few are left for a tile, it begins earlier, and does some of them again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from parleyd.cpu_kernels.instructions import LANES, TILE_BYTES, TILE_ROWS, VECTOR_BYTES, Emitter

# Of a row, what a tile holds.
TILE_INS = VECTOR_BYTES // 2

# Tiles: the sums of two times 16 rows and two groups of columns come first, then what is multiplied.
_ROWS, _COLUMNS = (4, 5), (6, 7)


@intrinsic
def multiply_tiles(context, num_groups, weights, x, num_ins, num_rows, product, product_stride):
    """As `tiles.multiply_rows` of weights in bfloat16. `num_ins`: of TILE_INS."""

    def generate(context, builder, signature, args):
        _Product(builder, *args).emit()
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


class _Product:
    """Emits the loops over columns, rows and tiles."""

    def __init__(
        self,
        builder: Any,
        num_groups: Any,
        weights: Any,
        x: Any,
        num_ins: Any,
        num_rows: Any,
        product: Any,
        stride: Any,
    ) -> None:
        self._builder, self._emit, self._kind = builder, Emitter(builder), num_ins.type
        self._num_groups, self._weights, self._x, self._product, self._stride = num_groups, weights, x, product, stride
        self._num_turns = builder.udiv(num_ins, self._kind(TILE_INS))
        self._group_bytes = builder.mul(self._num_turns, self._kind(TILE_BYTES))
        self._row_bytes = builder.mul(num_ins, self._kind(2))
        full = self._kind(TILE_ROWS)
        self._rows_of_tile = builder.select(builder.icmp_unsigned("<", num_rows, full), num_rows, full)
        self._last_first_row = builder.sub(num_rows, self._rows_of_tile)
        self._num_row_tiles = builder.udiv(builder.add(num_rows, self._kind(TILE_ROWS - 1)), full)
        self._room = [self._emit.room(TILE_BYTES) for _ in range(len(_ROWS) * len(_COLUMNS))]

    def emit(self) -> None:
        """Two by two, as a tile that is loaded is then multiplied twice."""
        self._emit.configure_tiles(self._rows_of_tile, _COLUMNS)
        self._by_twos(
            self._num_groups,
            lambda groups: self._by_twos(self._num_row_tiles, lambda tiles: self._multiply(groups, tiles)),
        )
        self._emit.release_tiles()

    def _by_twos(self, count: Any, emit: Callable[[list[Any]], None]) -> None:
        """Of all numbers below `count`, pairs of neighbours; then the one that is left."""
        builder, kind = self._builder, self._kind
        even = builder.and_(count, kind(-2))
        for start, end, width in ((kind(0), even, 2), (even, count, 1)):
            with cgutils.for_range_slice(builder, start, end, kind(width)) as (index, _):
                emit([builder.add(index, kind(further)) for further in range(width)])

    def _multiply(self, groups: list[Any], row_tiles: list[Any]) -> None:
        emit, builder = self._emit, self._builder
        first_rows = [self._first_row(tile) for tile in row_tiles]
        sums = [(row, group) for row in range(len(first_rows)) for group in range(len(groups))]
        for tile in range(len(sums)):
            emit.clear_tile(tile)
        with cgutils.for_range(builder, self._num_turns) as turn:
            for tile, group in zip(_COLUMNS, groups, strict=False):
                weights = emit.at(self._weights, group, self._group_bytes)
                self._load_columns(tile, weights, turn.index, len(groups), row_tiles[0])
            for tile, row in zip(_ROWS, first_rows, strict=False):
                inputs = emit.at(emit.at(self._x, row, self._row_bytes), turn.index, VECTOR_BYTES)
                emit.load_tile(tile, inputs, self._row_bytes)
            for tile, (row, group) in enumerate(sums):
                emit.add_products_of_tiles(tile, _ROWS[row], _COLUMNS[group])
        for tile, room in zip(range(len(sums)), self._room, strict=False):
            emit.store_tile(tile, room)
        for (row, group), room in zip(sums, self._room, strict=False):
            columns = emit.at(self._product, groups[group], 2 * LANES)
            with cgutils.for_range(builder, self._rows_of_tile) as line:
                floats = emit.load_floats(emit.at(room, line.index, VECTOR_BYTES))
                emit.store_bfloat16(emit.at(columns, builder.add(first_rows[row], line.index), self._stride), floats)

    def _first_row(self, row_tile: Any) -> Any:
        row = self._builder.mul(row_tile, self._kind(TILE_ROWS))
        is_whole = self._builder.icmp_unsigned("<", row, self._last_first_row)
        return self._builder.select(is_whole, row, self._last_first_row)

    def _load_columns(self, tile: int, group: Any, turn: Any, num_groups: int, row_tile: Any) -> None:
        """For the first rows, brings nearer those of the groups after these: the processor by itself is late."""
        emit = self._emit
        here = emit.at(group, turn, TILE_BYTES)
        with self._builder.if_then(self._builder.icmp_unsigned("==", row_tile, self._kind(0))):
            ahead = emit.at(here, num_groups, self._group_bytes)
            for line in range(TILE_BYTES // VECTOR_BYTES):
                emit.prefetch(emit.at(ahead, line, VECTOR_BYTES))
        emit.load_tile(tile, here, self._kind(VECTOR_BYTES))
