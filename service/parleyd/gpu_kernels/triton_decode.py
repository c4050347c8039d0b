"""Paged attention of decoding sequences as a Triton kernel: flash-decoding (Dao et al. 2023) over a block table.

A sequence is cut into splits of a fixed number of tokens, which run side by side and are put together afterwards. Where
it is cut depends on nothing but its own length, so neither does its result. Imports triton.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

_SPLIT_TOKENS = 256
# A longer context is cut into larger splits, not into more: each costs a program in every step, used or not.
_MAX_SPLITS = 64
_TILE_TOKENS = 64


def triton_decode(max_context_tokens: int) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]:
    """A DecodeKernel for sequences of up to so many tokens."""
    split_tokens = max(_SPLIT_TOKENS, triton.next_power_of_2(-(-max_context_tokens // _MAX_SPLITS)))
    num_splits = -(-max_context_tokens // split_tokens)

    def attend(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, scale: float) -> Tensor:
        num_rows, num_heads, head_dim = query.shape
        num_kv_heads, block_size = keys.shape[1:3]
        if query.stride()[1:] != (head_dim, 1):
            query = query.contiguous()
        group = num_heads // num_kv_heads
        # Of each split: what it attends to, and the logarithm of its weights' sum.
        partial = query.new_empty((num_rows, num_heads, num_splits, head_dim), dtype=torch.float32)
        weights = query.new_empty((num_rows, num_heads, num_splits), dtype=torch.float32)
        attended = torch.empty_like(query, memory_format=torch.contiguous_format)
        _attend_split[(num_rows, num_kv_heads, num_splits)](
            query, keys, values, table, lengths, partial, weights, scale,
            query.stride(0), keys.stride(0), keys.stride(1), keys.stride(2), table.stride(0),
            NUM_HEADS=num_heads, GROUP=group, PADDED_GROUP=_padded(group),
            HEAD_DIM=head_dim, PADDED_DIM=_padded(head_dim),
            BLOCK_SIZE=block_size, SPLIT=split_tokens, TILE=_TILE_TOKENS,
        )  # fmt: skip
        _combine_splits[(num_rows, num_heads)](
            partial, weights, lengths, attended,
            NUM_SPLITS=num_splits, HEAD_DIM=head_dim, PADDED_DIM=_padded(head_dim), SPLIT=split_tokens,
        )  # fmt: skip
        return attended

    return attend


def _padded(size: int) -> int:
    """What a matrix product takes."""
    return max(16, int(triton.next_power_of_2(size)))


# Tables grow with the longest sequence: to specialise on their width would compile in the middle of serving.
@triton.jit(do_not_specialize=["table_stride"])
def _attend_split(
    query, keys, values, table, lengths, partial, weights, scale,
    query_stride, block_stride, head_stride, token_stride, table_stride,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One split of one row, for all query heads of one KV head."""
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    start = split * SPLIT
    if start >= length:
        return
    end = tl.minimum(start + SPLIT, length)
    head, dim, token = tl.arange(0, PADDED_GROUP), tl.arange(0, PADDED_DIM), tl.arange(0, TILE)
    heads = kv_head * GROUP + head
    is_head, is_dim = head < GROUP, dim < HEAD_DIM
    q = tl.load(query + row * query_stride + heads[:, None] * HEAD_DIM + dim, mask=is_head[:, None] & is_dim, other=0.0)
    highest = tl.full([PADDED_GROUP], -float("inf"), tl.float32)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    attended = tl.zeros([PADDED_GROUP, PADDED_DIM], tl.float32)
    for first in range(start, end, TILE):
        tokens = first + token
        is_token = tokens < end
        block = tl.load(table + row * table_stride + tokens // BLOCK_SIZE, mask=is_token, other=0).to(tl.int64)
        places = block * block_stride + kv_head * head_stride + (tokens % BLOCK_SIZE) * token_stride
        is_there = is_token[:, None] & is_dim
        k = tl.load(keys + places[:, None] + dim, mask=is_there, other=0.0)
        v = tl.load(values + places[:, None] + dim, mask=is_there, other=0.0)
        scores = tl.where(is_token, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        rescale = tl.exp(highest - higher)
        probs = tl.exp(scores - higher[:, None])
        total = total * rescale + tl.sum(probs, 1)
        attended = attended * rescale[:, None] + tl.dot(probs.to(v.dtype), v, input_precision="ieee")
        highest = higher
    place = (row * NUM_HEADS + heads) * tl.num_programs(2) + split
    tl.store(partial + place[:, None] * HEAD_DIM + dim, attended / total[:, None], mask=is_head[:, None] & is_dim)
    tl.store(weights + place, highest + tl.log(total), mask=is_head)


@triton.jit
def _combine_splits(
    partial, weights, lengths, attended,
    NUM_SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The splits of one row and query head, in order."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = row * tl.num_programs(1) + head
    dim = tl.arange(0, PADDED_DIM)
    is_dim = dim < HEAD_DIM
    highest = -float("inf")
    total = 0.0
    result = tl.zeros([PADDED_DIM], tl.float32)
    for split in range(tl.cdiv(tl.load(lengths + row), SPLIT)):
        weight = tl.load(weights + place * NUM_SPLITS + split)
        part = tl.load(partial + (place * NUM_SPLITS + split) * HEAD_DIM + dim, mask=is_dim, other=0.0)
        higher = tl.maximum(highest, weight)
        result = result * tl.exp(highest - higher) + part * tl.exp(weight - higher)
        total = total * tl.exp(highest - higher) + tl.exp(weight - higher)
        highest = higher
    tl.store(attended + place * HEAD_DIM + dim, (result / total).to(attended.dtype.element_ty), mask=is_dim)
