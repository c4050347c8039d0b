"""Attention of decoding sequences to keys and values where they lie, block by block."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from parleyd.cpu_kernels.numbers import (
    FAST,
    bfloat16_array,
    float_argument,
    int32_array,
    power_of_two,
    prefetch,
    rounded,
    stack_floats,
    widened,
)
from parleyd.cpu_kernels.threads import Kernel, bits_of, num_threads, thread_index


def paged_decode(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """As `DecodeKernel` says; all but table and lengths (int32) in bfloat16."""
    num_rows, num_heads, head_dim = query.shape
    num_blocks, num_kv_heads, block_size, _ = keys.shape
    if query.stride()[1:] != (head_dim, 1) or query.stride(0) % head_dim:
        query = query.contiguous()
    attended = torch.empty(query.shape, dtype=query.dtype)
    _kernel(num_heads // num_kv_heads, head_dim, block_size)(
        num_rows * num_kv_heads,
        *(tensor.data_ptr() for tensor in (query, keys, values, table, lengths, attended)),
        num_rows, query.stride(0), num_blocks, num_kv_heads, table.stride(0), bits_of(scale * math.log2(math.e)),
    )  # fmt: skip
    return attended


@cache
def _kernel(group: int, head_dim: int, block_size: int) -> Kernel:
    """For heads of which so many share a KV head: constants, so that loops over them can be unrolled."""

    num_queries = group * head_dim
    block_bytes = block_size * head_dim * 2

    def attend(arguments):
        (queries_at, keys_at, values_at, table_at, lengths_at, attended_at,
         num_rows, query_stride, num_blocks, num_kv_heads, width, scale_bits) = carray(arguments, (12,))  # fmt: skip
        scale = float_argument(scale_bits)
        queries = bfloat16_array(queries_at, (num_rows, query_stride // head_dim, head_dim))
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        keys, values = bfloat16_array(keys_at, shape), bfloat16_array(values_at, shape)
        table, lengths = int32_array(table_at, (num_rows, width)), int32_array(lengths_at, (num_rows,))
        attended = bfloat16_array(attended_at, (num_rows, num_kv_heads, group, head_dim))
        weights = np.empty((group, width * block_size), np.float32)
        query = stack_floats(num_queries)
        sums = stack_floats(num_queries)
        token_scores = stack_floats(group)
        # The KV heads of a row go to threads in turn, so that long rows burden all alike.
        for task in range(thread_index(), num_rows * num_kv_heads, num_threads()):
            row, kv_head = divmod(task, num_kv_heads)
            length = lengths[row]
            last = (length - 1) // block_size
            for head in range(group):
                for i in range(head_dim):
                    query[head * head_dim + i] = widened(queries[row, kv_head * group + head, i]) * scale
            for block in range(last + 1):
                if block < last:
                    ahead = keys_at + (table[row, block + 1] * num_kv_heads + kv_head) * block_bytes
                else:
                    ahead = values_at + (table[row, 0] * num_kv_heads + kv_head) * block_bytes
                block_id = table[row, block]
                for token in range(min(block_size, length - block * block_size)):
                    prefetch(ahead + token * head_dim * 2, head_dim * 2)
                    for head in range(group):
                        score = np.float32(0)
                        for i in range(head_dim):
                            score += query[head * head_dim + i] * widened(keys[block_id, kv_head, token, i])
                        token_scores[head] = score
                    for head in range(group):
                        weights[head, block * block_size + token] = token_scores[head]
            for head in range(group):
                _softmax(weights[head, :length])
            for i in range(num_queries):
                sums[i] = np.float32(0)
            for block in range(last + 1):
                ahead = values_at + (table[row, min(block + 1, last)] * num_kv_heads + kv_head) * block_bytes
                block_id = table[row, block]
                for token in range(min(block_size, length - block * block_size)):
                    prefetch(ahead + token * head_dim * 2, head_dim * 2)
                    for head in range(group):
                        weight = weights[head, block * block_size + token]
                        for i in range(head_dim):
                            sums[head * head_dim + i] += weight * widened(values[block_id, kv_head, token, i])
            for head in range(group):
                for i in range(head_dim):
                    attended[row, kv_head, head, i] = rounded(sums[head * head_dim + i])

    return Kernel(attend)


@njit(fastmath=FAST, error_model="numpy")
def _softmax(scores):
    """In place, of the scores times ln 2."""
    highest = scores[0]
    for i in range(len(scores)):
        highest = scores[i] if scores[i] > highest else highest
    total = np.float32(0)
    for i in range(len(scores)):
        scores[i] = power_of_two(scores[i] - highest)
        total += scores[i]
    for i in range(len(scores)):
        scores[i] /= total
