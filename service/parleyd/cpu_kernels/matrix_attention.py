"""Attention on a processor's matrix unit (AMX): for the rows of one sequence that follow each other, as many as fit.

The queries of those rows that share a KV head attend together, to 16 or 32 tokens at a time. What a query makes of its
tokens is the same bit for bit whichever are beside it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from parleyd.cpu_kernels.instructions import LANES, TILE_BYTES, TILE_ROWS, VECTOR_BYTES, Emitter, has_matrix_unit
from parleyd.cpu_kernels.numbers import (
    address_of,
    bfloat16_array,
    float32_array,
    float_argument,
    int32_array,
    rounded,
    stack_floats,
)
from parleyd.cpu_kernels.rows import follows, softmax
from parleyd.cpu_kernels.threads import Function

# Tokens that a tile of weights has, and numbers of a head whose sums are held at a time.
_NUM_TOKENS, _NUM_DIMS = 2 * LANES, 4 * LANES
# Tiles of as many rows as there are queries: sums, and weights. Full ones: values; queries, keys and their scores.
_SUMS, _WEIGHTS = (0, 1, 2, 3), 4
_VALUES = _QUERIES = 5
_KEYS, _SCORES = 6, 7
_FULL = (5, 6, 7)


def can_attend_on_tiles(group: int, head_dim: int, block_size: int) -> bool:
    """Whether there is a matrix unit, and this shape fits it."""
    return has_matrix_unit() and group <= TILE_ROWS and head_dim % _NUM_DIMS == 0 and block_size == _NUM_TOKENS


def num_rows_on_tiles(group: int) -> int:
    """The most that attend together."""
    return TILE_ROWS // group


@cache
def attend_on_tiles(group: int, head_dim: int, block_size: int) -> Function:
    """See `decode.attend_head`, of at most `num_rows_on_tiles` together."""
    row_bytes, max_rows = 2 * head_dim, num_rows_on_tiles(group)
    num_columns, num_sums = head_dim // 2 * LANES, _NUM_DIMS * TILE_ROWS
    block_bytes, tile_bytes = row_bytes * block_size, row_bytes * LANES

    def apply(
        item, num_together, num_rows, queries_at, query_stride, keys_at, values_at, table_at, width, lengths_at,
        attended_at, num_kv_heads, scale_bits, weights_at,
    ):  # fmt: skip
        kv_head, chunk = divmod(item, (num_rows + num_together - 1) // num_together)
        row, end = chunk * num_together, min((chunk + 1) * num_together, num_rows)
        table, lengths = int32_array(table_at, (num_rows, width)), int32_array(lengths_at, (num_rows,))
        attended = bfloat16_array(attended_at, (num_rows, num_kv_heads, group, head_dim))
        num_tokens = width * block_size
        scores = float32_array(weights_at, (max_rows * group, num_tokens))
        rounded_at = weights_at + 4 * max_rows * group * num_tokens
        weights = bfloat16_array(rounded_at, (max_rows * group, num_tokens))
        columns, pairs, sums = stack_floats(num_columns), stack_floats(num_sums), stack_floats(num_sums)
        sums_at = address_of(sums)
        # What lies behind the last token is multiplied by 0, so it must be a number.
        for i in range(num_sums):
            pairs[i] = np.float32(0)
        configured = 0
        while row < end:
            first, row = row, row + 1
            while row < end and follows(row, table, lengths, block_size):
                row += 1
            num_queries, length = (row - first) * group, lengths[row - 1]
            last = (length - 1) // block_size
            queries = queries_at + 2 * (first * query_stride + kv_head * group * head_dim)
            _lay_out(columns, queries, query_stride, num_queries, group, head_dim)
            if num_queries != configured:  # which takes about as long as to attend to 16 tokens
                _configure(num_queries)
                configured = num_queries
            for block in range(last + 1):
                keys = keys_at + (table[row - 1, block] * num_kv_heads + kv_head) * block_bytes
                if block < last:
                    ahead = keys_at + (table[row - 1, block + 1] * num_kv_heads + kv_head) * block_bytes
                else:
                    ahead = values_at + (table[row - 1, 0] * num_kv_heads + kv_head) * block_bytes
                for tile in range(block_size // LANES):
                    _score(
                        head_dim, group, keys + tile * tile_bytes, address_of(columns), float_argument(scale_bits),
                        num_queries, weights_at + 4 * (block * block_size + tile * LANES), 4 * num_tokens,
                        ahead + tile * tile_bytes,
                    )  # fmt: skip
            for query in range(num_queries):
                _weigh(scores[query], weights[query], lengths[first + query // group], (last + 1) * block_size)
            for start in range(0, head_dim, _NUM_DIMS):
                _clear_sums()
                for block in range(last + 1):
                    values = values_at + (table[row - 1, block] * num_kv_heads + kv_head) * block_bytes
                    if block < last or row == end:
                        ahead = (
                            values_at + (table[row - 1, min(block + 1, last)] * num_kv_heads + kv_head) * block_bytes
                        )
                    else:
                        ahead = keys_at + (table[row, 0] * num_kv_heads + kv_head) * block_bytes
                    _add_values(
                        rounded_at + 2 * block * block_size, 2 * num_tokens, values + 2 * start, row_bytes,
                        min(block_size, length - block * block_size), address_of(pairs), ahead + 2 * start,
                    )  # fmt: skip
                _store_sums(sums_at)
                for query in range(num_queries):
                    for part in range(_NUM_DIMS // LANES):
                        totals = sums_at + 4 * LANES * (part * TILE_ROWS + query)
                        into = start + LANES * part
                        for lane in range(LANES):
                            total = float32_array(totals, (LANES,))[lane]
                            attended[first + query // group, kv_head, query % group, into + lane] = rounded(total)
        _release()

    return Function(apply)


@njit(forceinline=True)
def _lay_out(columns, queries_at, query_stride, num_queries, group, head_dim):
    """Queries side by side, two numbers of each in turn: `[head_dim / 2, LANES, 2]`, 0 where there is none."""
    num_lines = head_dim // 2
    for i in range(num_lines * LANES):
        columns[i] = np.float32(0)
    for query in range(num_queries):
        place = queries_at + 2 * (query // group * query_stride + query % group * head_dim)
        pairs = float32_array(place, (num_lines,))
        for line in range(num_lines):
            columns[line * LANES + query] = pairs[line]


@njit(forceinline=True)
def _weigh(scores, weights, length, num_tokens):
    """From scores to weights of the tokens that a query sees; of others, up to `num_tokens`, they are 0."""
    softmax(scores[:length])
    for token in range(length):
        weights[token] = rounded(scores[token])
    for token in range(length, num_tokens):
        weights[token] = 0


@intrinsic
def _configure(context, num_queries):
    def generate(context, builder, signature, args):
        Emitter(builder).configure_tiles(args[0], _FULL)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _release(context):
    def generate(context, builder, signature, args):
        Emitter(builder).release_tiles()
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic(prefer_literal=True)
def _score(context, head_dim, group, keys, columns, scale, num_queries, scores, scores_stride, ahead):
    """Of LANES tokens, whose keys (`[LANES, head_dim]`) follow each other. `head_dim`, `group`: constants.

    Addresses: `keys`; `columns`: the queries side by side, `[head_dim / 2, LANES, 2]`; `scores`: of the first query,
    float32, with `scores_stride` bytes to the next one's; `ahead`: of what will be read next.
    """
    num_tiles, num_of_row = head_dim.literal_value // (2 * LANES), group.literal_value

    def generate(context, builder, signature, args):
        _, _, keys, columns, scale, num_queries, scores, stride, ahead = args
        emit, int64 = Emitter(builder), keys.type
        emit.clear_tile(_SCORES)
        for index in range(num_tiles):
            emit.load_tile(_KEYS, emit.at(keys, index, VECTOR_BYTES), int64(num_tiles * VECTOR_BYTES))
            emit.load_tile(_QUERIES, emit.at(columns, index, TILE_BYTES), int64(VECTOR_BYTES))
            # A few at a time: of many at once, most would wait for room to be noted down in, and what is read too.
            for line in range(LANES):
                emit.prefetch(emit.at(ahead, index * LANES + line, VECTOR_BYTES))
            emit.add_products_of_tiles(_SCORES, _KEYS, _QUERIES)
        room = emit.room(TILE_BYTES)
        emit.store_tile(_SCORES, room)
        factor = emit.repeat(scale)

        def store(queries: range) -> None:
            of_queries = emit.transposed([emit.load_floats(emit.at(room, i, VECTOR_BYTES)) for i in range(LANES)])
            for query in queries:
                emit.store(emit.at(scores, query, stride), emit.multiply(of_queries[query], factor))

        store(range(num_of_row))
        with builder.if_then(builder.icmp_signed(">", num_queries, int64(num_of_row))):
            store(range(num_of_row, LANES // num_of_row * num_of_row))
        return context.get_dummy_value()

    return types.void(head_dim, group, types.int64, types.int64, types.float32, *[types.int64] * 4), generate


@intrinsic
def _clear_sums(context):
    def generate(context, builder, signature, args):
        for tile in _SUMS:
            Emitter(builder).clear_tile(tile)
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _store_sums(context, sums):
    """To `[_NUM_DIMS / LANES, TILE_ROWS, LANES]`, float32."""

    def generate(context, builder, signature, args):
        emit = Emitter(builder)
        for tile in _SUMS:
            emit.store_tile(tile, emit.at(args[0], tile, TILE_BYTES))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _add_values(context, weights, weights_stride, values, row_bytes, num_tokens, pairs, ahead):
    """To _NUM_DIMS of the sums of all queries, those of the values of some tokens, at most _NUM_TOKENS.

    Addresses: `weights`: of the first query, bfloat16, _NUM_TOKENS of them, 0 for those that are not there; `values`:
    of the first token; with the bytes to the next query's, token's. `pairs`: room for `[4, LANES, 2 * LANES]`,
    bfloat16. `ahead`: of what will be read next.
    """

    def generate(context, builder, signature, args):
        weights, weights_stride, values, row_bytes, num_tokens, pairs, ahead = args
        _pair_values(builder, values, row_bytes, num_tokens, pairs, ahead)
        emit = Emitter(builder)
        emit.load_tile(_WEIGHTS, weights, weights_stride)
        for tile in _SUMS:
            emit.load_tile(_VALUES, emit.at(pairs, tile, TILE_BYTES), weights.type(VECTOR_BYTES))
            emit.add_products_of_tiles(tile, _WEIGHTS, _VALUES)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


def _pair_values(builder: Any, values: Any, row_bytes: Any, num_tokens: Any, pairs: Any, ahead: Any) -> None:
    """Two tokens' numbers side by side, as a tile on the right has them."""
    emit, int64 = Emitter(builder), num_tokens.type
    with cgutils.for_range(builder, builder.lshr(builder.add(num_tokens, int64(1)), int64(1))) as loop:
        first = builder.mul(loop.index, int64(2))
        second = builder.add(first, int64(1))
        # Of an odd number, the last one stands beside itself, with a weight of 0.
        is_there = builder.icmp_signed("<", second, num_tokens)
        rows = (first, builder.select(is_there, second, first))
        for row in rows:
            emit.prefetch(emit.at(ahead, row, row_bytes))
            emit.prefetch(emit.at(emit.at(ahead, row, row_bytes), 1, VECTOR_BYTES))
        for half in range(2):
            one, other = (emit.load_ints(emit.at(emit.at(values, row, row_bytes), half, VECTOR_BYTES)) for row in rows)
            for quarter, vector in enumerate(emit.interleaved(one, other)):
                lines = emit.at(pairs, 2 * half + quarter, TILE_BYTES)
                emit.store_ints(emit.at(lines, loop.index, VECTOR_BYTES), vector)
