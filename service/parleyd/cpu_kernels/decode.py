"""Attention of decoding sequences to keys and values where they lie, block by block."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from numba import carray
from torch import Tensor

from parleyd.cpu_kernels.instructions import LANES
from parleyd.cpu_kernels.matrix_attention import attend_on_tiles, can_attend_on_tiles, num_rows_on_tiles
from parleyd.cpu_kernels.numbers import call
from parleyd.cpu_kernels.products_attention import attend_by_products, can_attend_by_products
from parleyd.cpu_kernels.rows import MAX_QUERIES
from parleyd.cpu_kernels.threads import Function, Kernel, bits_of, num_threads, thread_index
from parleyd.cpu_kernels.widened_attention import attend_widened

# Scores are powers of 2.
LOG2_E = math.log2(math.e)
# At least so many items for each KV head, and for each thread, if there are rows enough, so that threads have about as
# much to do each.
_MIN_CHUNKS, _MIN_ITEMS = 16, 8


def paged_decode(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """As `DecodeKernel` says; all but table and lengths (int32) in bfloat16."""
    num_rows, num_heads, head_dim = query.shape
    _, num_kv_heads, block_size, _ = keys.shape
    if query.stride()[1:] != (head_dim, 1):
        query = query.contiguous()
    attended = torch.empty(query.shape, dtype=query.dtype)
    group = num_heads // num_kv_heads
    num_items, num_together, num_weights = shares(
        num_rows, num_kv_heads, group, head_dim, block_size, table.shape[1] * block_size
    )
    weights = torch.empty((torch.get_num_threads(), num_weights))
    _kernel()(
        num_items, attend_head(group, head_dim, block_size).address,
        *(tensor.data_ptr() for tensor in (query, keys, values, table, lengths, attended, weights)),
        num_items, num_together, num_rows, query.stride(0), num_kv_heads, table.stride(0), bits_of(scale * LOG2_E),
        weights.stride(0),
    )  # fmt: skip
    return attended


@cache
def _kernel() -> Kernel:
    def apply(arguments):
        (attend, queries, keys, values, table, lengths, attended, weights, num_items, num_together,
         num_rows, query_stride, num_kv_heads, width, scale, num_weights) = carray(arguments, (16,))  # fmt: skip
        own_weights = weights + 4 * thread_index() * num_weights
        for item in range(thread_index(), num_items, num_threads()):
            call(
                attend, item, num_together, num_rows, queries, query_stride, keys, values, table, width, lengths,
                attended, num_kv_heads, scale, own_weights,
            )  # fmt: skip

    return Kernel(apply)


def attend_head(group: int, head_dim: int, block_size: int) -> Function:
    """Attends for the queries of `num_together` rows, the last ones fewer, that share a KV head. `item` counts those
    of all rows, one KV head's of all rows before the next one's: a prompt's rows then find what they read in the cache.

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


class Shares(NamedTuple):
    """How `attend_head` is shared out. `num_weights`: the room that it needs, in float32."""

    num_items: int
    num_together: int
    num_weights: int


def shares(num_rows: int, num_kv_heads: int, group: int, head_dim: int, block_size: int, num_tokens: int) -> Shares:
    """For a step's rows, which see at most so many tokens."""
    on_tiles = can_attend_on_tiles(group, head_dim, block_size)
    if on_tiles:
        num_together = num_rows_on_tiles(group)
    else:
        most = min(num_rows // _MIN_CHUNKS, num_rows * num_kv_heads // (_MIN_ITEMS * torch.get_num_threads()))
        num_together = max(1, min(most, MAX_QUERIES // group))
    num_scores = num_together * group * num_tokens
    num_weights = 0 if can_attend_by_products(head_dim) else num_scores
    if on_tiles:
        num_weights = num_scores * 3 // 2  # and weights in bfloat16
    return Shares(-(-num_rows // num_together) * num_kv_heads, num_together, num_weights)
