"""The innermost loops of attention in float32."""

from __future__ import annotations

from itertools import product
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from parleyd.cpu_kernels.instructions import LANES, VECTOR_BYTES, Emitter


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
def score_tokens(context, head_dim, query, keys, scale, scores):
    """Of LANES tokens, whose keys (`[LANES, head_dim]`) follow each other, in float32 as all else. `head_dim`: a
    constant. Addresses but for `scale`.
    """
    num_vectors = 4 * head_dim.literal_value // VECTOR_BYTES

    def generate(context, builder, signature, args):
        _, query, keys, scale, scores = args
        emit = Emitter(builder)
        queries = [emit.load_floats(emit.at(query, index, VECTOR_BYTES)) for index in range(num_vectors)]

        def score(token: int) -> Any:
            total = emit.floats(0.0)
            for index, vector in enumerate(queries):
                key = emit.load_floats(emit.at(keys, token * num_vectors + index, VECTOR_BYTES))
                total = emit.add_product(total, vector, key)
            return total

        dots = emit.sums_of(map(score, range(LANES)))
        emit.store(scores, emit.multiply(dots, emit.repeat(scale)))
        return context.get_dummy_value()

    return types.void(head_dim, types.int64, types.int64, types.float32, types.int64), generate


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
