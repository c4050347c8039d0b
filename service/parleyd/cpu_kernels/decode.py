"""Attention of decoding sequences to keys and values where they lie, block by block."""

from __future__ import annotations

import math
from functools import cache

import torch
from numba import carray
from torch import Tensor

from parleyd.cpu_kernels.instructions import LANES
from parleyd.cpu_kernels.matrix_attention import attend_on_tiles, can_attend_on_tiles, num_rows_on_tiles
from parleyd.cpu_kernels.numbers import call
from parleyd.cpu_kernels.products_attention import attend_by_products, can_attend_by_products
from parleyd.cpu_kernels.rows import num_rows_together
from parleyd.cpu_kernels.threads import Function, Kernel, bits_of, num_threads, thread_index
from parleyd.cpu_kernels.widened_attention import attend_widened

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
    max_rows, num_weights = shares(group, head_dim, block_size, num_rows, table.shape[1] * block_size)
    num_items = -(-num_rows // max_rows) * num_kv_heads
    weights = torch.empty((torch.get_num_threads(), num_weights))
    _kernel()(
        num_items, attend_head(group, head_dim, block_size).address,
        *(tensor.data_ptr() for tensor in (query, keys, values, table, lengths, attended, weights)),
        num_items, num_rows, query.stride(0), num_kv_heads, table.stride(0), bits_of(scale * LOG2_E), weights.stride(0),
    )  # fmt: skip
    return attended


@cache
def _kernel() -> Kernel:
    def apply(arguments):
        (attend, queries, keys, values, table, lengths, attended, weights, num_items,
         num_rows, query_stride, num_kv_heads, width, scale, num_weights) = carray(arguments, (15,))  # fmt: skip
        own_weights = weights + 4 * thread_index() * num_weights
        for item in range(thread_index(), num_items, num_threads()):
            call(
                attend, item, num_rows, queries, query_stride, keys, values, table, width, lengths, attended,
                num_kv_heads, scale, own_weights,
            )  # fmt: skip

    return Kernel(apply)


def attend_head(group: int, head_dim: int, block_size: int) -> Function:
    """Attends for the queries of one row that share a KV head, or of several, see `shares`. `item` counts those of all
    rows, one KV head's of all rows before the next one's: a prompt's rows then find what they read in the cache.

    Constants, so that loops over them can be unrolled: `group`, how many queries those are; `head_dim`; `block_size`.
    `query_stride`: numbers from a row's queries to the next row's; `width`: blocks of a row of the table; `scale_bits`:
    of scores, times LOG2_E; `weights_at`: see `shares`.

    Raises ValueError where vectors of LANES numbers do not fit the shape.
    """
    if head_dim % LANES or block_size % LANES:
        raise ValueError(f"heads of {head_dim} numbers, in blocks of {block_size} tokens")
    if can_attend_on_tiles(group, head_dim, block_size):
        return attend_on_tiles(group, head_dim, block_size)
    if can_attend_by_products(head_dim):
        return attend_by_products(group, head_dim, block_size)
    return attend_widened(group, head_dim, block_size)


def shares(group: int, head_dim: int, block_size: int, num_rows: int, num_tokens: int) -> tuple[int, int]:
    """How many rows of a step an item of `attend_head` has, of which the last may have fewer, and the room for weights,
    in float32, that it needs for so many tokens."""
    if can_attend_on_tiles(group, head_dim, block_size):
        max_rows = num_rows_on_tiles(group)
        return max_rows, max_rows * group * num_tokens * 3 // 2  # scores, then weights in bfloat16
    max_rows = int(num_rows_together.py_func(group, num_rows))
    return max_rows, 0 if can_attend_by_products(head_dim) else max_rows * group * num_tokens
