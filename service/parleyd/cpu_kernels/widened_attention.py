"""Attention in float32, for any processor: keys and values are widened once for the rows of one sequence that follow
each other. What a row makes of its tokens is the same bit for bit whichever are beside it.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from parleyd.cpu_kernels.attention_tiles import add_values, lay_out_keys, score_keys, widen
from parleyd.cpu_kernels.instructions import LANES, has_many_registers
from parleyd.cpu_kernels.numbers import (
    address_of,
    bfloat16_array,
    float32_array,
    float_argument,
    int32_array,
    rounded,
    stack_floats,
    widened,
)
from parleyd.cpu_kernels.rows import MAX_QUERIES, follows, softmax
from parleyd.cpu_kernels.threads import Function

# Queries that are scored at once: those of as many rows, at least of one.
_AT_ONCE = 12
# Of 32 registers, those that hold sums.
_MAX_SUMS = 18


def _num_parts(group: int, head_dim: int) -> int:
    """Vectors of a head whose sums are held in registers, for all heads of a group: as many as find room in 32, since
    each sum waits for its last product. Half as many hold no more than one, with what it is made of."""
    most = max(1, _MAX_SUMS // group) if has_many_registers() else 1
    return max(num for num in range(1, most + 1) if head_dim // LANES % num == 0)


@cache
def attend_widened(group: int, head_dim: int, block_size: int) -> Function:
    """See `decode.attend_head`."""
    max_rows, block_bytes = max(1, MAX_QUERIES // group), 2 * block_size * head_dim
    num_numbers, num_wide = max_rows * group * head_dim, block_size * head_dim
    num_parts, at_once = _num_parts(group, head_dim), group * max(1, _AT_ONCE // group)
    num_tiles = 2 if has_many_registers() and block_size // LANES % 2 == 0 else 1
    tile_bytes = 2 * LANES * head_dim

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
        queries, sums, wide = stack_floats(num_numbers), stack_floats(num_numbers), stack_floats(num_wide)
        while row < end:
            first, row = row, row + 1
            while row < end and follows(row, table, lengths, block_size):
                row += 1
            num_queries, last = (row - first) * group, (lengths[row - 1] - 1) // block_size
            for query in range(num_queries):
                place = 2 * ((first + query // group) * query_stride + (kv_head * group + query % group) * head_dim)
                numbers = bfloat16_array(queries_at + place, (head_dim,))
                for i in range(head_dim):
                    queries[query * head_dim + i] = widened(numbers[i])
                    sums[query * head_dim + i] = np.float32(0)
            for block in range(last + 1):
                keys = keys_at + (table[row - 1, block] * num_kv_heads + kv_head) * block_bytes
                if block < last:
                    ahead = keys_at + (table[row - 1, block + 1] * num_kv_heads + kv_head) * block_bytes
                else:
                    ahead = values_at + (table[row - 1, 0] * num_kv_heads + kv_head) * block_bytes
                # What lies behind the last token is scored too, and not looked at.
                for begin in range(0, block_size // LANES, num_tiles):
                    for tile in range(num_tiles):
                        offset, lines = (begin + tile) * tile_bytes, address_of(wide) + 2 * tile * tile_bytes
                        lay_out_keys(head_dim, keys + offset, lines, ahead + offset)
                    into = weights_at + 4 * (block * block_size + begin * LANES)
                    query = 0
                    while query + at_once <= num_queries:
                        score_keys(
                            head_dim, at_once, num_tiles, address_of(queries) + 4 * query * head_dim, address_of(wide),
                            float_argument(scale_bits), into + 4 * query * num_tokens, 4 * num_tokens,
                        )  # fmt: skip
                        query += at_once
                    while query < num_queries:
                        score_keys(
                            head_dim, group, num_tiles, address_of(queries) + 4 * query * head_dim, address_of(wide),
                            float_argument(scale_bits), into + 4 * query * num_tokens, 4 * num_tokens,
                        )  # fmt: skip
                        query += group
            for query in range(num_queries):
                softmax(scores[query, : lengths[first + query // group]])
            for block in range(last + 1):
                values = values_at + (table[row - 1, block] * num_kv_heads + kv_head) * block_bytes
                ahead = values_at + (table[row - 1, min(block + 1, last)] * num_kv_heads + kv_head) * block_bytes
                num_here = min(block_size, lengths[row - 1] - block * block_size)
                widen(values, num_here * head_dim // LANES, address_of(wide), ahead)
                for index in range(row - first):
                    num_seen = min(num_here, lengths[first + index] - block * block_size)
                    for part in range(0, head_dim // LANES, num_parts):
                        add_values(
                            group, num_parts, weights_at + 4 * (index * group * num_tokens + block * block_size),
                            4 * num_tokens, address_of(wide) + 4 * LANES * part, 4 * head_dim, num_seen,
                            address_of(sums) + 4 * (index * group * head_dim + LANES * part), 4 * head_dim,
                        )  # fmt: skip
            for query in range(num_queries):
                for i in range(head_dim):
                    total = rounded(sums[query * head_dim + i])
                    attended[first + query // group, kv_head, query % group, i] = total

    return Function(apply)
