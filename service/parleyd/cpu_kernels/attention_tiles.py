"""The innermost loops of attention, for LANES tokens or two rows of values at a time: sums in float32."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from parleyd.cpu_kernels.instructions import LANES, VECTOR_BYTES, Emitter

# Of the numbers of a head.
DIM_MULTIPLE = 2 * LANES


@intrinsic
def widen(context, narrow, num_vectors, wide, ahead):
    """Makes float32 at `wide` of the LANES bfloat16 of each vector at `narrow`; as many at `ahead` are read next."""

    def generate(context, builder, signature, args):
        narrow, num_vectors, wide, ahead = args
        emit = Emitter(builder)
        with cgutils.for_range(builder, num_vectors) as loop:
            emit.prefetch(emit.at(ahead, loop.index, VECTOR_BYTES // 2))
            numbers = emit.load_bfloat16(emit.at(narrow, loop.index, VECTOR_BYTES // 2))
            emit.store(emit.at(wide, loop.index, VECTOR_BYTES), numbers)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic(prefer_literal=True)
def score_tokens(context, head_dim, item_bytes, query, keys, scale, scores):
    """Of LANES tokens, whose keys (`[LANES, head_dim]`) follow each other. Constants:
    `head_dim`; `item_bytes`, of a number of query and keys: 2 of a bfloat16, 4 of a float32.

    Addresses but for `scale`, a float32; `scores` are float32.
    """
    num_vectors = head_dim.literal_value * item_bytes.literal_value // VECTOR_BYTES
    is_wide = item_bytes.literal_value == 4

    def generate(context, builder, signature, args):
        _, _, query, keys, scale, scores = args
        emit = Emitter(builder)
        load, add = emit.load_ints, emit.add_products_of_bfloat16
        if is_wide:
            load, add = emit.load_floats, emit.add_product
        queries = [load(emit.at(query, index, VECTOR_BYTES)) for index in range(num_vectors)]

        def score(token: int) -> Any:
            total = emit.floats(0.0)
            for index, vector in enumerate(queries):
                total = add(total, vector, load(emit.at(keys, token * num_vectors + index, VECTOR_BYTES)))
            return total

        dots = emit.sums_of(map(score, range(LANES)))
        emit.store(scores, emit.multiply(dots, emit.repeat(scale)))
        return context.get_dummy_value()

    return types.void(head_dim, item_bytes, types.int64, types.int64, types.float32, types.int64), generate


@intrinsic(prefer_literal=True)
def add_wide_values(context, group, weights, weights_stride, values, row_bytes, num_tokens, sums, sums_stride):
    """As `add_values`, to LANES numbers of the sums, where weights and values are float32."""
    num_heads = group.literal_value

    def generate(context, builder, signature, args):
        _, weights, weights_stride, values, row_bytes, num_tokens, sums, sums_stride = args
        emit = Emitter(builder)

        def add(token: Any, totals: list[Any]) -> list[Any]:
            vector = emit.load_floats(emit.at(values, token, row_bytes))
            heads = [emit.at(emit.at(weights, head, weights_stride), token, 4) for head in range(num_heads)]
            return [
                emit.add_product(total, vector, emit.repeat_float(weight))
                for total, weight in zip(totals, heads, strict=True)
            ]

        for head, total in enumerate(emit.sums(num_heads, num_tokens, add)):
            address = emit.at(sums, head, sums_stride)
            emit.store(address, emit.add(emit.load_floats(address), total))
        return context.get_dummy_value()

    return types.void(group, *[types.int64] * 7), generate


@intrinsic(prefer_literal=True)
def add_values(context, group, weights, weights_stride, values, row_bytes, num_tokens, sums, sums_stride, ahead):
    """To DIM_MULTIPLE numbers of the sums of `group` heads (a constant), those of the values of some tokens.

    Addresses: `weights`: of the first head, bfloat16, an even number of them; `values`: of the first token; `sums`: of
    the first head, float32; with the bytes to the next head's, token's, head's. `ahead`: of what will be read next.
    """
    num_heads = group.literal_value

    def generate(context, builder, signature, args):
        _, weights, weights_stride, values, row_bytes, num_tokens, sums, sums_stride, ahead = args
        emit, int64 = Emitter(builder), num_tokens.type

        def add(pair: Any, totals: list[Any]) -> list[Any]:
            first = builder.mul(pair, int64(2))
            second = builder.add(first, int64(1))
            # Of an odd number, the last one stands beside itself, with a weight of 0.
            is_there = builder.icmp_signed("<", second, num_tokens)
            rows = (first, builder.select(is_there, second, first))
            for row in rows:
                emit.prefetch(emit.at(ahead, row, row_bytes))
            pairs = emit.interleaved(*(emit.load_ints(emit.at(values, row, row_bytes)) for row in rows))
            for head in range(num_heads):
                weight = emit.repeat_int(emit.at(emit.at(weights, head, weights_stride), pair, 4))
                for half, vector in enumerate(pairs):
                    place = 2 * head + half
                    totals[place] = emit.add_products_of_bfloat16(totals[place], vector, weight)
            return totals

        num_pairs = builder.lshr(builder.add(num_tokens, int64(1)), int64(1))
        for place, total in enumerate(emit.sums(2 * num_heads, num_pairs, add)):
            address = emit.at(emit.at(sums, place // 2, sums_stride), place % 2, VECTOR_BYTES)
            emit.store(address, emit.add(emit.load_floats(address), total))
        return context.get_dummy_value()

    return types.void(group, *[types.int64] * 8), generate
