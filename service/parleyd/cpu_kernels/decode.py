"""Attention of decoding sequences to keys and values where they lie, block by block."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from parleyd.cpu_kernels.attention_tiles import DIM_MULTIPLE, add_values, score_tokens
from parleyd.cpu_kernels.instructions import LANES, has_bfloat16
from parleyd.cpu_kernels.matrix_attention import attend_on_tiles, can_attend_on_tiles, num_rows_on_tiles
from parleyd.cpu_kernels.numbers import (
    address_of,
    bfloat16_array,
    call,
    float32_array,
    float_argument,
    int32_array,
    prefetch,
    rounded,
    stack_floats,
)
from parleyd.cpu_kernels.rows import softmax
from parleyd.cpu_kernels.threads import Function, Kernel, bits_of, num_threads, thread_index
from parleyd.cpu_kernels.widened_attention import attend_widened, num_rows_widened

# Scores are powers of 2.
LOG2_E = math.log2(math.e)


def paged_decode(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """As `DecodeKernel` says; all but table and lengths (int32) in bfloat16."""
    num_rows, num_heads, head_dim = query.shape
    _, num_kv_heads, block_size, _ = keys.shape
    if query.stride()[1:] != (head_dim, 1):
        query = query.contiguous()
    attended = torch.empty(query.shape, dtype=query.dtype)
    group = num_heads // num_kv_heads
    max_rows = num_rows_at_once(group, head_dim, block_size, num_rows)
    num_items = -(-num_rows // max_rows) * num_kv_heads
    scores = torch.empty((torch.get_num_threads(), num_weights(max_rows * group, table.shape[1] * block_size)))
    _kernel()(
        num_items, attend_head(group, head_dim, block_size).address,
        *(tensor.data_ptr() for tensor in (query, keys, values, table, lengths, attended, scores)),
        num_items, num_rows, query.stride(0), num_kv_heads, table.stride(0), bits_of(scale * LOG2_E), scores.stride(0),
    )  # fmt: skip
    return attended


@cache
def _kernel() -> Kernel:
    def apply(arguments):
        (attend, queries, keys, values, table, lengths, attended, scores, num_items,
         num_rows, query_stride, num_kv_heads, width, scale, num_scores) = carray(arguments, (15,))  # fmt: skip
        own_scores = scores + 4 * thread_index() * num_scores
        for item in range(thread_index(), num_items, num_threads()):
            call(
                attend, item, num_rows, queries, query_stride, keys, values, table, width, lengths, attended,
                num_kv_heads, scale, own_scores,
            )  # fmt: skip

    return Kernel(apply)


def attend_head(group: int, head_dim: int, block_size: int) -> Function:
    """Attends for the queries of one row that share a KV head, or of `num_rows_at_once`. `item` counts those of all
    rows, one KV head's of all rows before the next one's: a prompt's rows then find what they read in the cache.

    Constants, so that loops over them can be unrolled: `group`, how many queries those are; `head_dim`; `block_size`.
    `query_stride`: numbers from a row's queries to the next row's; `width`: blocks of a row of the table; `scale_bits`:
    of scores, times LOG2_E; `weights_at`: see `num_weights`.

    Raises ValueError where vectors of LANES numbers do not fit the shape.
    """
    if head_dim % LANES or block_size % LANES:
        raise ValueError(f"heads of {head_dim} numbers, in blocks of {block_size} tokens")
    if can_attend_on_tiles(group, head_dim, block_size):
        return attend_on_tiles(group, head_dim, block_size)
    if _can_attend_by_products(head_dim):
        return _attend_head_with_products(group, head_dim, block_size)
    return attend_widened(group, head_dim, block_size)


def _can_attend_by_products(head_dim: int) -> bool:
    """Whether this processor has the instructions, and this shape fits them."""
    return has_bfloat16() and head_dim % DIM_MULTIPLE == 0


def num_rows_at_once(group: int, head_dim: int, block_size: int, num_rows: int) -> int:
    """How many rows of a step an item of `attend_head` has; the last one may have fewer."""
    if can_attend_on_tiles(group, head_dim, block_size):
        return num_rows_on_tiles(group)
    if _can_attend_by_products(head_dim):
        return 1
    return int(num_rows_widened.py_func(group, num_rows))


def num_weights(num_queries: int, num_tokens: int) -> int:
    """The room, in float32, that `attend_head` needs for an item's queries of so many tokens: scores, then weights in
    bfloat16."""
    return num_queries * num_tokens * 3 // 2


@cache
def _attend_head_with_products(group: int, head_dim: int, block_size: int) -> Function:
    num_queries, row_bytes = group * head_dim, 2 * head_dim
    block_bytes, tile_bytes = row_bytes * block_size, row_bytes * LANES

    def apply(
        head, num_rows, queries_at, query_stride, keys_at, values_at, table_at, width, lengths_at, attended_at,
        num_kv_heads, scale_bits, weights_at,
    ):  # fmt: skip
        kv_head, row = divmod(head, num_rows)
        table, lengths = int32_array(table_at, (row + 1, width)), int32_array(lengths_at, (row + 1,))
        attended = bfloat16_array(attended_at, (row + 1, num_kv_heads, group, head_dim))
        length, num_tokens = lengths[row], width * block_size
        scores = float32_array(weights_at, (group, num_tokens))
        rounded_at = weights_at + 4 * group * num_tokens
        weights = bfloat16_array(rounded_at, (group, num_tokens))
        query_at = queries_at + 2 * (row * query_stride + kv_head * num_queries)
        last = (length - 1) // block_size
        for block in range(last + 1):
            keys = keys_at + (table[row, block] * num_kv_heads + kv_head) * block_bytes
            if block < last:
                ahead = keys_at + (table[row, block + 1] * num_kv_heads + kv_head) * block_bytes
            else:
                ahead = values_at + (table[row, 0] * num_kv_heads + kv_head) * block_bytes
            # What lies behind the last token is scored too, and not looked at.
            for tile in range(block_size // LANES):
                prefetch(ahead + tile * tile_bytes, tile_bytes)
                for query_head in range(group):
                    score_tokens(
                        head_dim, 2, query_at + query_head * row_bytes, keys + tile * tile_bytes,
                        float_argument(scale_bits),
                        weights_at + 4 * (query_head * num_tokens + block * block_size + tile * LANES),
                    )  # fmt: skip
        for query_head in range(group):
            softmax(scores[query_head, :length])
            for token in range(length):
                weights[query_head, token] = rounded(scores[query_head, token])
            if length % 2:
                weights[query_head, length] = 0
        sums = stack_floats(num_queries)
        for i in range(num_queries):
            sums[i] = np.float32(0)
        for block in range(last + 1):
            values = values_at + (table[row, block] * num_kv_heads + kv_head) * block_bytes
            ahead = values_at + (table[row, min(block + 1, last)] * num_kv_heads + kv_head) * block_bytes
            for part in range(head_dim // DIM_MULTIPLE):
                add_values(
                    group, rounded_at + 2 * block * block_size, 2 * num_tokens, values + 2 * DIM_MULTIPLE * part,
                    row_bytes, min(block_size, length - block * block_size),
                    address_of(sums) + 4 * DIM_MULTIPLE * part, 4 * head_dim, ahead + 2 * DIM_MULTIPLE * part,
                )  # fmt: skip
        for query_head in range(group):
            for i in range(head_dim):
                attended[row, kv_head, query_head, i] = rounded(sums[query_head * head_dim + i])

    return Function(apply)
