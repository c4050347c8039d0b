"""The innermost loops of attention in float32."""

from __future__ import annotations

from itertools import product
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from parleyd.cpu_kernels.instructions import LANES, VECTOR_BYTES, Emitter, has_many_registers

# Scores of LANES tokens that are summed at once, in registers.
_MOST_SUMS = 24 if has_many_registers() else 6


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
def lay_out_keys(context, head_dim, keys, lines, ahead):
    """Of LANES tokens, whose bfloat16 keys (`[LANES, head_dim]`) follow each other, makes float32 lines, each the same
    number of all: `[head_dim, LANES]`. `head_dim`: a constant. Addresses; as much at `ahead` is read next.
    """
    row_bytes, half = 2 * head_dim.literal_value, LANES // 2

    def generate(context, builder, signature, args):
        _, keys, lines, ahead = args
        emit = Emitter(builder)
        with cgutils.for_range(builder, args[1].type(head_dim.literal_value // LANES)) as loop:
            here, following = (emit.at(address, loop.index, 2 * LANES) for address in (keys, ahead))
            for token in range(LANES):
                emit.prefetch(emit.at(following, token, row_bytes))
            # Pairs of numbers, of which a token has half a vector's.
            pairs = [
                emit.load_halves_of_ints(emit.at(here, token, row_bytes), half * row_bytes) for token in range(half)
            ]
            line = emit.at(lines, loop.index, LANES * VECTOR_BYTES)
            for index, pair in enumerate(emit.transposed(pairs)):
                for number, vector in enumerate(emit.widened(pair)):
                    emit.store(emit.at(line, 2 * index + number, VECTOR_BYTES), vector)
        return context.get_dummy_value()

    return types.void(head_dim, *[types.int64] * 3), generate


@intrinsic(prefer_literal=True)
def score_keys(context, head_dim, num_queries, num_tiles, queries, lines, scale, scores, scores_stride):
    """Of some queries (`[num_queries, head_dim]`, float32) and `num_tiles` times LANES tokens, of whose keys
    `lay_out_keys` has made `lines`, one tile after the other.

    Constants: `head_dim`, `num_queries`, `num_tiles`. Addresses but for `scale`, a float32; `scores_stride`: bytes to
    the next query's.
    """
    size, tiles = head_dim.literal_value, range(num_tiles.literal_value)

    def generate(context, builder, signature, args):
        _, _, _, queries, lines, scale, scores, stride = args
        emit = Emitter(builder)
        for some in _parts(num_queries.literal_value, _MOST_SUMS // len(tiles)):

            def add(index: Any, totals: list[Any], some: range = some) -> list[Any]:
                line = emit.at(lines, index, VECTOR_BYTES)
                keys = [emit.load_floats(emit.at(line, tile, size * VECTOR_BYTES)) for tile in tiles]
                for place, query in enumerate(some):
                    number = emit.repeat_float(emit.at(emit.at(queries, query, 4 * size), index, 4))
                    for sum_of in range(place * len(tiles), (place + 1) * len(tiles)):
                        totals[sum_of] = emit.add_product(totals[sum_of], number, keys[sum_of % len(tiles)])
                return totals

            totals = emit.sums(len(some) * len(tiles), queries.type(size), add)
            for (query, tile), total in zip(product(some, tiles), totals, strict=True):
                place = emit.at(emit.at(scores, query, stride), tile, VECTOR_BYTES)
                emit.store(place, emit.multiply(total, emit.repeat(scale)))
        return context.get_dummy_value()

    kinds = [*[types.int64] * 2, types.float32, *[types.int64] * 2]
    return types.void(head_dim, num_queries, num_tiles, *kinds), generate


def _parts(count: int, most: int) -> list[range]:
    """As few as can be, of about as many each."""
    num = -(-count // most)
    return [range(index * count // num, (index + 1) * count // num) for index in range(num)]


@intrinsic(prefer_literal=True)
def add_values(context, group, num_parts, weights, weights_stride, values, row_bytes, num_tokens, sums, sums_stride):
    """To `num_parts` times LANES numbers of the sums of `group` heads (constants), those of the values of some tokens,
    all in float32.

    Addresses: `weights`: of the first head; `values`: of the first token; `sums`: of the first head; with the bytes to
    the next head's, token's, head's.
    """
    heads, parts = range(group.literal_value), range(num_parts.literal_value)

    def generate(context, builder, signature, args):
        _, _, weights, weights_stride, values, row_bytes, num_tokens, sums, sums_stride = args
        emit = Emitter(builder)

        def add(token: Any, totals: list[Any]) -> list[Any]:
            row = emit.at(values, token, row_bytes)
            vectors = [emit.load_floats(emit.at(row, part, VECTOR_BYTES)) for part in parts]
            repeated = [emit.repeat_float(emit.at(emit.at(weights, head, weights_stride), token, 4)) for head in heads]
            pairs = product(repeated, vectors)
            return [emit.add_product(total, *pair) for total, pair in zip(totals, pairs, strict=True)]

        totals = emit.sums(len(heads) * len(parts), num_tokens, add)
        for (head, part), total in zip(product(heads, parts), totals, strict=True):
            address = emit.at(emit.at(sums, head, sums_stride), part, VECTOR_BYTES)
            emit.store(address, emit.add(emit.load_floats(address), total))
        return context.get_dummy_value()

    return types.void(group, num_parts, *[types.int64] * 7), generate
