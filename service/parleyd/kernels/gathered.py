"""Attention on any device: sequences' blocks are gathered, then attended to.

Where there are kernels that read the blocks where they lie (choice.py), they take the place of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from parleyd.kernels.cache import PagedKVCache
from parleyd.kernels.paged import block_table
from parleyd.model.upload import upload
from parleyd.scheduling.request import Scheduled

# Sequences that are gathered together have no more tokens than this, each filled up to the longest: it is memory that
# nobody has set aside, and more would not stay in a CPU's cache.
_MAX_TOKENS = 2**12
# Of a prompt's rows, as many attend at a time.
_MAX_ROWS = 64


@dataclass(frozen=True)
class Gathered:
    """Some sequences' last tokens, of each as many: consecutive rows of the batch.

    `head_blocks`: `[sequences * kv_heads * blocks]`, see `PagedKVCache.gather`. `mask`: `[sequences, 1, tokens of each,
    1, blocks * block_size]`, 0 or -inf.
    """

    rows: slice
    head_blocks: Tensor
    mask: Tensor

    @classmethod
    def of_decodes(cls, decodes: list[Scheduled], cache: PagedKVCache) -> Iterator[Gathered]:
        """Those that come first in a batch, each of one token."""
        start = 0
        while start < len(decodes):
            end, longest = start, 0
            while end < len(decodes):
                longest = max(longest, decodes[end].start + 1)
                if end > start and (end + 1 - start) * longest > _MAX_TOKENS:
                    break
                end += 1
            yield cls.of(decodes[start:end], start, cache)
            start = end

    @classmethod
    def of(cls, scheduled: list[Scheduled], row: int, cache: PagedKVCache) -> Gathered:
        """`row`: the first."""
        num_tokens = scheduled[0].num_tokens
        table = block_table(scheduled, cache.block_size).astype(np.int64)
        head_blocks = table[:, None, :] * cache.num_kv_heads + np.arange(cache.num_kv_heads)[:, None]
        positions = np.array([item.start for item in scheduled])[:, None, None] + np.arange(num_tokens)[:, None]
        is_beyond = upload(np.arange(table.shape[1] * cache.block_size) > positions, cache.device)
        mask = torch.zeros(is_beyond.shape, dtype=cache.keys.dtype, device=cache.device)
        mask.masked_fill_(is_beyond, -torch.inf)
        rows = slice(row, row + len(scheduled) * num_tokens)
        return cls(rows, upload(head_blocks.reshape(-1), cache.device), mask[:, None, :, None, :])

    def attend(self, cache: PagedKVCache, layer: int, query: Tensor, scale: float) -> Tensor:
        """See Part."""
        num_sequences, _, num_tokens, _, _ = self.mask.shape
        query = query[self.rows]
        key, value = (
            one.view(num_sequences, cache.num_kv_heads, -1, cache.head_dim)
            for one in cache.gather(layer, self.head_blocks)
        )
        # The heads that share a KV head stand in for query positions, so that keys need not be repeated for each.
        by_head = query.reshape(num_sequences, num_tokens, cache.num_kv_heads, -1, cache.head_dim).transpose(1, 2)
        attended = torch.empty_like(by_head)
        for start in range(0, num_tokens, _MAX_ROWS):
            rows = slice(start, start + _MAX_ROWS)
            some = by_head[:, :, rows]
            mask = self.mask[:, :, rows].expand(-1, -1, -1, some.shape[3], -1).flatten(2, 3)
            result = F.scaled_dot_product_attention(some.flatten(2, 3), key, value, attn_mask=mask, scale=scale)
            attended[:, :, rows] = result.view(some.shape)
        return attended.transpose(1, 2).reshape(query.shape)
