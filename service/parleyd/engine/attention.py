"""Attention over the paged KV cache, for a step's flattened batch: decoding sequences first, then chunks of prompts.

Works on any device that SDPA works on: the blocks of all decoding sequences are gathered and attended to in one call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from parleyd.engine.request import Batch, Scheduled


class PagedKVCache:
    """Keys and values of all layers in blocks: `[layers, blocks, block_size, kv_heads, head_dim]` each."""

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        self.block_size = shape[2]
        self.keys = _zeros(shape, dtype, torch.device(device))
        self.values = _zeros(shape, dtype, torch.device(device))


@dataclass(frozen=True)
class DecodeGroup:
    """The first `num_rows` rows of the batch, one token each.

    `block_ids`: `[rows * blocks]`, padded with block 0. `mask`: `[rows, 1, 1, blocks * block_size]`, 0 or -inf.
    """

    num_rows: int
    block_ids: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class PrefillChunk:
    """Rows `start` to `end` of the batch: consecutive tokens of one prompt.

    `block_ids`: `[blocks]` of the whole prefix; None where the chunk begins the prompt, so that it attends to itself
    alone. `mask`: `[rows, num_prefix]`, 0 or -inf; None then too.
    """

    start: int
    end: int
    block_ids: torch.Tensor | None = None
    num_prefix: int = 0
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class StepLayout:
    """Where a step's rows belong. `slots`: `[rows]`, the index of each row's token in the flattened cache."""

    slots: torch.Tensor
    decode: DecodeGroup | None
    prefills: tuple[PrefillChunk, ...]

    @classmethod
    def of(cls, batch: Batch, cache: PagedKVCache) -> StepLayout:
        """The layout of a batch, on the cache's device and with masks of its type."""
        device = cache.keys.device
        slots = torch.frombuffer(batch.slots(cache.block_size), dtype=torch.int64).to(device)
        num_decodes = batch.num_decodes
        decode = _decode_group(batch.scheduled[:num_decodes], cache) if num_decodes else None
        prefills, row = [], num_decodes
        for item in batch.scheduled[num_decodes:]:
            prefills.append(_prefill_chunk(item, row, cache))
            row += item.num_tokens
        return cls(slots, decode, tuple(prefills))


def attend(
    cache: PagedKVCache,
    layer: int,
    layout: StepLayout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Writes `key` and `value` (`[rows, kv_heads, head_dim]`) into the cache, and attends.

    `query`: `[rows, heads, head_dim]`, as is the result.
    """
    keys, values = cache.keys[layer], cache.values[layer]
    keys.view(-1, *key.shape[1:]).index_copy_(0, layout.slots, key)
    values.view(-1, *value.shape[1:]).index_copy_(0, layout.slots, value)
    parts = [_attend_prefill(keys, values, chunk, query, key, value, scale) for chunk in layout.prefills]
    if layout.decode is not None:
        parts.insert(0, _attend_decode(keys, values, layout.decode, query, scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_decode(
    keys: torch.Tensor, values: torch.Tensor, group: DecodeGroup, query: torch.Tensor, scale: float
) -> torch.Tensor:
    rows, (num_heads, head_dim), num_kv_heads = group.num_rows, query.shape[1:], keys.shape[2]
    gathered_keys = _gather(keys, group.block_ids).view(rows, -1, num_kv_heads, head_dim).transpose(1, 2)
    gathered_values = _gather(values, group.block_ids).view(rows, -1, num_kv_heads, head_dim).transpose(1, 2)
    # The heads that share a KV head stand in for query positions, so that keys need not be repeated for each.
    grouped = query[:rows].reshape(rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    attended = F.scaled_dot_product_attention(
        grouped, gathered_keys, gathered_values, attn_mask=group.mask, scale=scale
    )
    return attended.reshape(rows, num_heads, head_dim)


def _attend_prefill(
    keys: torch.Tensor,
    values: torch.Tensor,
    chunk: PrefillChunk,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    rows = slice(chunk.start, chunk.end)
    if chunk.block_ids is None:
        key, value = key[rows], value[rows]
    else:
        key = _gather(keys, chunk.block_ids).view(-1, *key.shape[1:])[: chunk.num_prefix]
        value = _gather(values, chunk.block_ids).view(-1, *value.shape[1:])[: chunk.num_prefix]
    attended = F.scaled_dot_product_attention(
        query[rows].transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended[0].transpose(0, 1)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros: what is masked must be finite. In main memory only pages that are written to take room."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Not torch.zeros, which writes them all: seconds at the start, and gigabytes that perhaps nobody will need.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _gather(blocks: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """Whole blocks, copied as rows: `[blocks, block_size * kv_heads * head_dim]`."""
    return blocks.flatten(1).index_select(0, block_ids)


def _decode_group(scheduled: list[Scheduled], cache: PagedKVCache) -> DecodeGroup:
    size, device = cache.block_size, cache.keys.device
    lengths = np.array([item.start + 1 for item in scheduled], np.int64)
    num_blocks = -(-int(lengths.max()) // size)
    table = np.zeros((len(scheduled), num_blocks), np.int64)
    for row, item in enumerate(scheduled):
        num_own = item.start // size + 1
        table[row, :num_own] = item.block_ids[:num_own]
    is_beyond = np.arange(num_blocks * size)[None, :] >= lengths[:, None]
    mask = torch.zeros(is_beyond.shape, dtype=cache.keys.dtype)
    mask.masked_fill_(torch.from_numpy(is_beyond), -torch.inf)
    return DecodeGroup(len(scheduled), torch.from_numpy(table).flatten().to(device), mask[:, None, None, :].to(device))


def _prefill_chunk(item: Scheduled, row: int, cache: PagedKVCache) -> PrefillChunk:
    end = row + item.num_tokens
    if item.start == 0:
        return PrefillChunk(row, end)
    device, num_prefix = cache.keys.device, item.start + item.num_tokens
    block_ids = torch.tensor(item.block_ids[: -(-num_prefix // cache.block_size)].tolist(), device=device)
    mask = torch.full((item.num_tokens, num_prefix), -torch.inf, dtype=cache.keys.dtype, device=device)
    return PrefillChunk(row, end, block_ids, num_prefix, mask.triu_(item.start + 1))
