"""Attention by products of bfloat16, for the rows of one sequence that follow each other, as many as are given.

Keys and values are laid out once for all of their queries, which see some tokens after others: what they have made of
those before is scaled down where a higher score comes. What a query makes of its tokens is the same bit for bit
whichever are beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from parleyd.cpu_kernels.instructions import LANES, VECTOR_BYTES, Emitter, has_bfloat16
from parleyd.cpu_kernels.numbers import (
    address_of,
    bfloat16_array,
    float32_array,
    float_argument,
    int32_array,
    power_of_two,
    rounded,
    stack_floats,
)
from parleyd.cpu_kernels.rows import MAX_QUERIES, follows
from parleyd.cpu_kernels.threads import Function

# Tokens whose scores are held at a time.
_PART_TOKENS = 256
# Numbers of a head whose sums are held at a time.
_NUM_DIMS = 2 * LANES


def can_attend_by_products(head_dim: int) -> bool:
    """Whether this processor has the instructions, and this shape fits them."""
    return has_bfloat16() and head_dim % _NUM_DIMS == 0


def _num_queries_at_once(group: int) -> tuple[int, int]:
    """Whose sums are held in registers: where there are no more than so many, and where there are. Where there are
    fewer, what lies behind them is multiplied too: so two times four, as three times are no faster."""
    few = group if 3 <= group <= 8 else 4
    return few, 8 if few == 4 else few * (12 // few)


@cache
def attend_by_products(group: int, head_dim: int, block_size: int) -> Function:
    """As `decode.attend_head`, without room for weights."""
    few, many = _num_queries_at_once(group)
    max_queries = -(-max(MAX_QUERIES, group) // many) * many
    part_blocks = max(1, _PART_TOKENS // block_size)
    part_tokens, num_pairs = part_blocks * block_size, head_dim // 2
    row_bytes, tile_bytes, block_bytes = 2 * head_dim, 2 * head_dim * LANES, 2 * head_dim * block_size
    num_sums, num_query_pairs = max_queries * head_dim, max_queries * num_pairs
    num_laid_out = max(num_pairs, block_size) * LANES  # a tile of keys, or _NUM_DIMS of a block's values
    num_scores, num_weight_pairs = max_queries * part_tokens, max_queries * part_tokens // 2

    def apply(
        item, num_together, num_rows, queries_at, query_stride, keys_at, values_at, table_at, width, lengths_at,
        attended_at, num_kv_heads, scale_bits, _,
    ):  # fmt: skip
        kv_head, chunk = divmod(item, (num_rows + num_together - 1) // num_together)
        row, end = chunk * num_together, min((chunk + 1) * num_together, num_rows)
        table, lengths = int32_array(table_at, (num_rows, width)), int32_array(lengths_at, (num_rows,))
        attended = bfloat16_array(attended_at, (num_rows, num_kv_heads, group, head_dim))
        queries, sums = stack_floats(num_query_pairs), stack_floats(num_sums)
        totals, highest = stack_floats(max_queries), stack_floats(max_queries)
        scores_at, weights_at = address_of(stack_floats(num_scores)), address_of(stack_floats(num_weight_pairs))
        laid_out_at = address_of(stack_floats(num_laid_out))
        while row < end:
            first, row = row, row + 1
            while row < end and follows(row, table, lengths, block_size):
                row += 1
            num_queries, num_blocks = (row - first) * group, (lengths[row - 1] + block_size - 1) // block_size
            for query in range(num_queries):
                place = 2 * ((first + query // group) * query_stride + (kv_head * group + query % group) * head_dim)
                pairs = float32_array(queries_at + place, (num_pairs,))
                for i in range(num_pairs):
                    queries[query * num_pairs + i] = pairs[i]
                for i in range(head_dim):
                    sums[query * head_dim + i] = np.float32(0)
                totals[query], highest[query] = np.float32(0), -np.inf
            for begin in range(0, num_blocks, part_blocks):
                after = min(begin + part_blocks, num_blocks)
                for block in range(begin, after):
                    keys = keys_at + (table[first, block] * num_kv_heads + kv_head) * block_bytes
                    if block + 1 < after:
                        ahead = keys_at + (table[first, block + 1] * num_kv_heads + kv_head) * block_bytes
                    else:
                        ahead = values_at + (table[first, begin] * num_kv_heads + kv_head) * block_bytes
                    # What lies behind the last token is scored too, and not looked at.
                    for tile in range(block_size // LANES):
                        offset, into = tile * tile_bytes, scores_at + 4 * ((block - begin) * block_size + tile * LANES)
                        _score_keys(
                            head_dim, few, many, address_of(queries), keys + offset, num_queries > few, laid_out_at,
                            float_argument(scale_bits), into, 4 * part_tokens, ahead + offset,
                        )  # fmt: skip
                        for query in range(many, num_queries, many):
                            _score(
                                head_dim, many, address_of(queries) + query * row_bytes, laid_out_at,
                                float_argument(scale_bits), into + 4 * query * part_tokens, 4 * part_tokens,
                            )  # fmt: skip
                num_vectors = (after - begin) * block_size // LANES
                for query in range(num_queries):
                    scores, weights = scores_at + 4 * query * part_tokens, weights_at + 2 * query * part_tokens
                    num_seen = min(part_tokens, lengths[first + query // group] - begin * block_size)
                    before = highest[query]
                    highest[query] = _highest(scores, num_vectors, num_seen, before)
                    factor = power_of_two(before - highest[query])
                    totals[query] = totals[query] * factor + _weigh(
                        scores, num_vectors, num_seen, highest[query], weights
                    )
                    for i in range(head_dim):
                        sums[query * head_dim + i] *= factor
                for block in range(begin, after):
                    values = values_at + (table[first, block] * num_kv_heads + kv_head) * block_bytes
                    if block + 1 < after or after == num_blocks:
                        following = table[first, min(block + 1, num_blocks - 1)]
                        ahead = values_at + (following * num_kv_heads + kv_head) * block_bytes
                    else:
                        ahead = keys_at + (table[first, after] * num_kv_heads + kv_head) * block_bytes
                    num_seen = min(block_size, lengths[row - 1] - block * block_size)
                    weights = weights_at + 2 * (block - begin) * block_size
                    for part in range(head_dim // _NUM_DIMS):
                        offset, into = 2 * _NUM_DIMS * part, address_of(sums) + 4 * _NUM_DIMS * part
                        _add_values(
                            few, many, weights, 2 * part_tokens, values + offset, row_bytes, num_seen,
                            num_queries > few, laid_out_at, into, 4 * head_dim, ahead + offset,
                        )  # fmt: skip
                        for query in range(many, num_queries, many):
                            _add_pairs(
                                many, weights + 2 * query * part_tokens, 2 * part_tokens, laid_out_at,
                                (num_seen + 1) // 2, into + 4 * query * head_dim, 4 * head_dim,
                            )  # fmt: skip
            for query in range(num_queries):
                factor = np.float32(1) / totals[query]
                for i in range(head_dim):
                    total = rounded(sums[query * head_dim + i] * factor)
                    attended[first + query // group, kv_head, query % group, i] = total

    return Function(apply)


@intrinsic(prefer_literal=True)
def _score_keys(context, head_dim, few, many, queries, keys, is_many, lines, scale, scores, scores_stride, ahead):
    """Of `few` or `many` queries (`[queries, head_dim]`) and LANES tokens, whose keys (`[LANES, head_dim]`) follow each
    other.

    Constants: `head_dim`, `few`, `many`. `is_many`: then other queries may `_score` what is laid out at `lines`, pairs
    of numbers of all tokens side by side, `[head_dim / 2, LANES, 2]`. `scale`: a float32. Addresses: `scores`, float32,
    with `scores_stride` bytes to the next query's; `ahead`: of what will be read next.
    """
    num_vectors = 2 * head_dim.literal_value // VECTOR_BYTES

    def generate(context, builder, signature, args):
        _, _, _, queries, keys, is_many, lines, scale, scores, stride, ahead = args
        emit = Emitter(builder)

        def vectors(index: Any) -> Iterable[Any]:
            tokens = []
            for token in range(LANES):
                place = emit.at(index, token * num_vectors)
                emit.prefetch(emit.at(ahead, place, VECTOR_BYTES))
                tokens.append(emit.load_ints(emit.at(keys, place, VECTOR_BYTES)))
            return emit.transposed(tokens)

        def vectors_kept(index: Any) -> Iterable[Any]:
            for line, vector in enumerate(vectors(index)):
                place = emit.at(builder.mul(index, index.type(LANES)), line)
                emit.store_ints(emit.at(lines, place, VECTOR_BYTES), vector)
                yield vector

        with builder.if_else(is_many) as branches:
            for branch, num_queries, make in zip(branches, (many, few), (vectors_kept, vectors), strict=True):
                with branch:
                    _emit_scores(emit, head_dim, num_queries, queries, make, scale, scores, stride)
        return context.get_dummy_value()

    kinds = [*[types.int64] * 2, types.boolean, types.int64, types.float32, *[types.int64] * 3]
    return types.void(head_dim, few, many, *kinds), generate


@intrinsic(prefer_literal=True)
def _score(context, head_dim, num_queries, queries, lines, scale, scores, scores_stride):
    """The same, of keys that `_score_keys` has laid out."""

    def generate(context, builder, signature, args):
        _, _, queries, lines, scale, scores, stride = args
        emit = Emitter(builder)

        def vectors(index: Any) -> Iterable[Any]:
            place = builder.mul(index, index.type(LANES))
            return (emit.load_ints(emit.at(lines, emit.at(place, line), VECTOR_BYTES)) for line in range(LANES))

        _emit_scores(emit, head_dim, num_queries, queries, vectors, scale, scores, stride)
        return context.get_dummy_value()

    kinds = [*[types.int64] * 2, types.float32, *[types.int64] * 2]
    return types.void(head_dim, num_queries, *kinds), generate


def _emit_scores(
    emit: Emitter, head_dim: Any, num_queries: Any, queries: Any, vectors: Callable[[Any], Iterable[Any]], scale: Any,
    scores: Any, stride: Any,
) -> None:  # fmt: skip
    """`vectors(index)`: LANES of them, each a pair of numbers of LANES tokens."""

    def add(index: Any, totals: list[Any]) -> list[Any]:
        for line, vector in enumerate(vectors(index)):
            for query, total in enumerate(totals):
                pairs = emit.at(emit.at(queries, query, 2 * head_dim.literal_value), index, VECTOR_BYTES)
                totals[query] = emit.add_products_of_bfloat16(total, vector, emit.repeat_int(emit.at(pairs, line, 4)))
        return totals

    num_vectors = queries.type(2 * head_dim.literal_value // VECTOR_BYTES)
    factor = emit.repeat(scale)
    for query, total in enumerate(emit.sums(num_queries.literal_value, num_vectors, add)):
        emit.store(emit.at(scores, query, stride), emit.multiply(total, factor))


@intrinsic
def _highest(context, scores, num_vectors, num_tokens, before):
    """The highest of the first `num_tokens` scores at an address and one `before`, a float32. NaN is passed over."""

    def generate(context, builder, signature, args):
        scores, num_vectors, num_tokens, before = args
        emit = Emitter(builder)

        def larger(index: Any, largest: list[Any]) -> list[Any]:
            vector = emit.load_floats(emit.at(scores, index, VECTOR_BYTES))
            start = builder.mul(index, index.type(LANES))
            return [emit.larger(emit.first(builder.sub(num_tokens, start), vector, -math.inf), largest[0])]

        (largest,) = emit.sums(1, num_vectors, larger, start=emit.repeat(before))
        return emit.folded(largest, emit.larger)

    return types.float32(types.int64, types.int64, types.int64, types.float32), generate


@intrinsic
def _weigh(context, scores, num_vectors, num_tokens, highest, weights):
    """Makes bfloat16 weights of the first `num_tokens` scores and returns their sum; the others' are 0.

    Addresses: `scores`, `weights`. `highest`: of the scores, a float32.
    """

    def generate(context, builder, signature, args):
        scores, num_vectors, num_tokens, highest, weights = args
        emit = Emitter(builder)
        highest = emit.repeat(highest)

        def add(index: Any, totals: list[Any]) -> list[Any]:
            vector = emit.load_floats(emit.at(scores, index, VECTOR_BYTES))
            powers = emit.power_of_two(emit.subtract(vector, highest))
            start = builder.mul(index, index.type(LANES))
            seen = emit.first(builder.sub(num_tokens, start), powers, 0.0)
            emit.store_bfloat16(emit.at(weights, index, VECTOR_BYTES // 2), seen)
            return [emit.add(totals[0], seen)]

        (total,) = emit.sums(1, num_vectors, add)
        return emit.folded(total, emit.add)

    return types.float32(types.int64, types.int64, types.int64, types.float32, types.int64), generate


@intrinsic(prefer_literal=True)
def _add_values(
    context,
    few,
    many,
    weights,
    weights_stride,
    values,
    row_bytes,
    num_tokens,
    is_many,
    pairs,
    sums,
    sums_stride,
    ahead,
):
    """To _NUM_DIMS of the sums of `few` or `many` queries (constants), those of the values of some tokens.

    `is_many`: then other queries may `_add_pairs` of what is laid out at `pairs`, two tokens' numbers side by side,
    `[num_tokens / 2, _NUM_DIMS, 2]`. Addresses: `weights`: of the first query, bfloat16, an even number of them;
    `values`: of the first token; `sums`: of the first query, float32; with the bytes to the next query's, token's,
    query's; `ahead`: of what will be read next.
    """

    def generate(context, builder, signature, args):
        _, _, weights, weights_stride, values, row_bytes, num_tokens, is_many, pairs, sums, sums_stride, ahead = args
        emit, int64 = Emitter(builder), num_tokens.type

        def vectors(pair: Any) -> Iterable[Any]:
            first = builder.mul(pair, int64(2))
            second = builder.add(first, int64(1))
            # Of an odd number, the last one stands beside itself, with a weight of 0.
            is_there = builder.icmp_signed("<", second, num_tokens)
            rows = (first, builder.select(is_there, second, first))
            for row in rows:
                emit.prefetch(emit.at(ahead, row, row_bytes))
            return emit.interleaved(*(emit.load_ints(emit.at(values, row, row_bytes)) for row in rows))

        def vectors_kept(pair: Any) -> Iterable[Any]:
            for half, vector in enumerate(vectors(pair)):
                emit.store_ints(emit.at(emit.at(pairs, half, VECTOR_BYTES), pair, 2 * VECTOR_BYTES), vector)
                yield vector

        num_pairs = builder.lshr(builder.add(num_tokens, int64(1)), int64(1))
        with builder.if_else(is_many) as branches:
            for branch, num_queries, make in zip(branches, (many, few), (vectors_kept, vectors), strict=True):
                with branch:
                    _emit_sums(emit, num_queries, weights, weights_stride, make, num_pairs, sums, sums_stride)
        return context.get_dummy_value()

    return types.void(few, many, *[types.int64] * 5, types.boolean, *[types.int64] * 4), generate


@intrinsic(prefer_literal=True)
def _add_pairs(context, num_queries, weights, weights_stride, pairs, num_pairs, sums, sums_stride):
    """The same, of values that `_add_values` has laid out."""

    def generate(context, builder, signature, args):
        _, weights, weights_stride, pairs, num_pairs, sums, sums_stride = args
        emit = Emitter(builder)

        def vectors(pair: Any) -> Iterable[Any]:
            both = emit.at(pairs, pair, 2 * VECTOR_BYTES)
            return (emit.load_ints(emit.at(both, half, VECTOR_BYTES)) for half in range(2))

        _emit_sums(emit, num_queries, weights, weights_stride, vectors, num_pairs, sums, sums_stride)
        return context.get_dummy_value()

    return types.void(num_queries, *[types.int64] * 6), generate


def _emit_sums(
    emit: Emitter, num_queries: Any, weights: Any, weights_stride: Any, vectors: Callable[[Any], Iterable[Any]],
    num_pairs: Any, sums: Any, sums_stride: Any,
) -> None:  # fmt: skip
    """`vectors(pair)`: two of them, each LANES numbers of two tokens."""

    def add(pair: Any, totals: list[Any]) -> list[Any]:
        both = list(vectors(pair))
        for query in range(num_queries.literal_value):
            weight = emit.repeat_int(emit.at(emit.at(weights, query, weights_stride), pair, 4))
            for half, vector in enumerate(both):
                totals[2 * query + half] = emit.add_products_of_bfloat16(totals[2 * query + half], vector, weight)
        return totals

    for place, total in enumerate(emit.sums(2 * num_queries.literal_value, num_pairs, add)):
        address = emit.at(emit.at(sums, place // 2, sums_stride), place % 2, VECTOR_BYTES)
        emit.store(address, emit.add(emit.load_floats(address), total))
