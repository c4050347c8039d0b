"""Attention on any device: a sequence's blocks are gathered, then attended to.

Where there are kernels that read the blocks where they lie (choice.py), they take the place of either part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache as cached

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from parleyd.kernels.cache import PagedKVCache
from parleyd.kernels.paged import block_table
from parleyd.model.upload import upload
from parleyd.scheduling.request import Scheduled

# Keys that are gathered at once: what a CPU's cache may still hold when they are multiplied.
_GATHER_BYTES = 6 * 2**20
# Tokens of padding in one gathering; to save more, another round of small operations is worth its time.
_MAX_PADDING = 2048
# Gathered tokens from which on matrix products are faster than SDPA on a CPU, by up to three times.
_MANY_TOKENS = 2048
# A prompt's rows that a CPU attends to at once: at most so many, fewer where their scores would take more than this.
_STRIP_ROWS, _MIN_STRIP_ROWS = 64, 8
_STRIP_BYTES = 32 * 2**20


@dataclass(frozen=True)
class _Group:
    """Decoding rows of about the same length. `rows`: None for all of the part's, in order.

    `head_blocks`: `[rows * kv_heads * blocks]`. `mask`: `[rows, 1, 1, blocks * block_size]`, 0 or -inf.
    """

    rows: Tensor | None
    head_blocks: Tensor
    mask: Tensor

    @classmethod
    def of(cls, scheduled: list[Scheduled], rows: Tensor | None, cache: PagedKVCache) -> _Group:
        table = block_table(scheduled, cache.block_size).astype(np.int64)
        lengths = np.array([item.start + 1 for item in scheduled])
        is_beyond = np.arange(table.shape[1] * cache.block_size) >= lengths[:, None]
        mask = torch.zeros(is_beyond.shape, dtype=cache.keys.dtype)
        mask.masked_fill_(torch.from_numpy(is_beyond), -torch.inf)
        head_blocks = _head_blocks(table, cache.num_kv_heads)
        return cls(rows, upload(head_blocks, cache.device), mask[:, None, None, :].to(cache.device))

    def attend(self, cache: PagedKVCache, layer: int, query: Tensor, scale: float) -> Tensor:
        """`query`: `[rows, heads, head_dim]`."""
        num_rows, (num_kv_heads, head_dim) = len(query), (cache.num_kv_heads, cache.head_dim)
        key, value = (one.view(num_rows, num_kv_heads, -1, head_dim) for one in cache.gather(layer, self.head_blocks))
        # The heads that share a KV head stand in for query positions, so that keys need not be repeated for each.
        grouped = query.reshape(num_rows, num_kv_heads, -1, head_dim)
        if query.is_cuda or self.mask.numel() < _MANY_TOKENS:
            attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=self.mask, scale=scale)
        else:
            attended = _attend_by_products(grouped, key, value, self.mask, scale)
        return attended.reshape(query.shape)


@dataclass(frozen=True)
class GatheredDecode:
    """The first `num_rows` rows of the batch, one token each."""

    num_rows: int
    groups: tuple[_Group, ...]

    @classmethod
    def of(cls, scheduled: list[Scheduled], cache: PagedKVCache) -> GatheredDecode:
        """Gathered together, as long as they are few and their lengths do not differ much."""
        lengths = np.array([item.start + 1 for item in scheduled])
        groups = list(_split(-(-lengths // cache.block_size), cache))
        if len(groups) == 1:
            return cls(len(scheduled), (_Group.of(scheduled, None, cache),))
        return cls(
            len(scheduled),
            tuple(_Group.of([scheduled[row] for row in rows], upload(rows, cache.device), cache) for rows in groups),
        )

    def attend(
        self, cache: PagedKVCache, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """See Part."""
        query = query[: self.num_rows]
        attended = torch.empty_like(query, memory_format=torch.contiguous_format)
        for group in self.groups:
            if group.rows is None:
                return group.attend(cache, layer, query, scale)
            attended.index_copy_(0, group.rows, group.attend(cache, layer, query.index_select(0, group.rows), scale))
        return attended


@dataclass(frozen=True)
class GatheredPrefill:
    """Rows `start` to `end` of the batch: consecutive tokens of one prompt.

    `head_blocks`: `[kv_heads * blocks]` of the whole prefix; None where the chunk begins the prompt, so that it attends
    to itself alone. `mask`: `[rows, num_prefix]`, 0 or -inf, on CUDA; None then too.
    """

    start: int
    end: int
    head_blocks: Tensor | None = None
    num_prefix: int = 0
    mask: Tensor | None = None

    @classmethod
    def of(cls, item: Scheduled, row: int, cache: PagedKVCache) -> GatheredPrefill:
        """`row`: the first."""
        end = row + item.num_tokens
        if item.start == 0:
            return cls(row, end)
        num_prefix = item.start + item.num_tokens
        head_blocks = _head_blocks(block_table([item], cache.block_size).astype(np.int64), cache.num_kv_heads)
        mask = None
        if cache.device.type == "cuda":
            mask = torch.full((item.num_tokens, num_prefix), -torch.inf, dtype=cache.keys.dtype, device=cache.device)
            mask.triu_(item.start + 1)
        return cls(row, end, upload(head_blocks, cache.device), num_prefix, mask)

    def attend(
        self, cache: PagedKVCache, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """See Part."""
        rows = slice(self.start, self.end)
        key, value = key[rows].transpose(0, 1), value[rows].transpose(0, 1)
        if self.head_blocks is not None:
            gathered = cache.gather(layer, self.head_blocks)
            key, value = (one.view(len(key), -1, cache.head_dim)[:, : self.num_prefix] for one in gathered)
        if not query.is_cuda:
            wide = _type_of_products(query.dtype)
            key, value = key.contiguous().to(wide), value.contiguous().to(wide)
            return _attend_by_strips(query[rows].to(wide), key, value, scale).to(query.dtype)
        if self.mask is not None:  # with one and fewer KV heads SDPA would hold all scores in memory
            key, value = (one.repeat_interleave(query.shape[1] // len(one), 0) for one in (key, value))
        attended = F.scaled_dot_product_attention(
            query[rows].transpose(0, 1)[None],
            key[None],
            value[None],
            attn_mask=self.mask,
            is_causal=self.mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != len(key),
        )
        return attended[0].transpose(0, 1)


def _type_of_products(dtype: torch.dtype) -> torch.dtype:
    """Which type a CPU multiplies matrices of `dtype` in: bfloat16 takes it many times as long as float32 where it has
    no instructions for it."""
    is_slow = dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if is_slow else dtype


def _attend_by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """As SDPA. `query`: `[rows, kv_heads, group, head_dim]`."""
    num_rows, num_kv_heads, group, _ = query.shape
    scores = query.new_empty(num_rows * num_kv_heads, group, key.shape[2])
    torch.baddbmm(scores, query.flatten(0, 1), key.flatten(0, 1).mT, beta=0, alpha=scale, out=scores)
    scores.view(num_rows, num_kv_heads * group, -1).add_(mask[:, 0])
    return torch.bmm(scores.softmax(-1), value.flatten(0, 1))


def _attend_by_strips(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of a sequence's last rows, a strip of them at a time: half the time of SDPA on a CPU.

    `query`: `[rows, heads, head_dim]`, as is the result; `key`, `value`: `[kv_heads, tokens, head_dim]`.
    """
    (num_rows, _, head_dim), (num_kv_heads, num_tokens, _) = query.shape, key.shape
    by_head = query.view(num_rows, num_kv_heads, -1, head_dim).transpose(0, 1)
    attended = torch.empty_like(query, memory_format=torch.contiguous_format)
    result = attended.view(num_rows, num_kv_heads, -1, head_dim).transpose(0, 1)
    row_bytes = query.shape[1] * num_tokens * query.dtype.itemsize
    size = min(num_rows, _STRIP_ROWS, max(_MIN_STRIP_ROWS, _STRIP_BYTES // row_bytes))
    mask = _causal_mask(size, query.dtype)
    for start in range(0, num_rows, size):
        strip = by_head[:, start : start + size]
        num_strip, group = strip.shape[1:3]
        num_seen = num_tokens - num_rows + start + num_strip
        scores = query.new_empty(num_kv_heads, num_strip * group, num_seen)
        rows, keys = strip.reshape(num_kv_heads, -1, head_dim), key[:, :num_seen].mT
        torch.baddbmm(scores, rows, keys, beta=0, alpha=scale, out=scores)
        last = scores.view(num_kv_heads, num_strip, group, num_seen)[..., num_seen - num_strip :]
        last.add_(mask[:num_strip, :, :num_strip])
        result[:, start : start + size] = torch.bmm(scores.softmax(-1), value[:, :num_seen]).view(strip.shape)
    return attended


@cached
def _causal_mask(size: int, dtype: torch.dtype) -> Tensor:
    """`[rows, 1, keys]`, 0 or -inf."""
    return torch.full((size, size), -torch.inf, dtype=dtype).triu_(1)[:, None]


def _split(num_blocks: NDArray[np.int64], cache: PagedKVCache) -> Iterator[NDArray[np.int64]]:
    """The rows of each gathering, the longest first. `num_blocks`: `[rows]`."""
    block_bytes = cache.block_size * cache.num_kv_heads * cache.head_dim * cache.keys.dtype.itemsize
    rows = np.argsort(-num_blocks, kind="stable")
    while len(rows):
        longest = num_blocks[rows[0]]
        padding = np.cumsum(longest - num_blocks[rows]) * cache.block_size
        size = min(int((padding <= _MAX_PADDING).sum()), max(1, int(_GATHER_BYTES // (longest * block_bytes))))
        yield rows[:size]
        rows = rows[size:]


def _head_blocks(table: NDArray[np.int64], num_kv_heads: int) -> NDArray[np.int64]:
    """`[rows * kv_heads * blocks]` for `PagedKVCache.gather`. `table`: `[rows, blocks]`."""
    heads = np.arange(num_kv_heads)[:, None]
    head_blocks: NDArray[np.int64] = table[:, None, :] * num_kv_heads + heads
    return head_blocks.reshape(-1)
