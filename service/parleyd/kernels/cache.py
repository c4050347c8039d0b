"""The paged KV cache: keys and values in blocks, written by slots, gathered by blocks."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parleyd.kernels.paged import NO_KERNELS, Kernels
from parleyd.scheduling.request import BlockCopy


class PagedKVCache:
    """Keys and values of all layers in blocks: `[layers, blocks + 1, kv_heads, block_size, head_dim]` each.

    A head's tokens lie together, as batched matrix products want them. The block after the last is scratch, where rows
    write that are nobody's.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int, int],
        dtype: torch.dtype,
        device: torch.device | str,
        kernels: Kernels = NO_KERNELS,
    ) -> None:
        """`shape`: layers, blocks, block size, KV heads, head dimension."""
        num_layers, self.num_blocks, self.block_size, self.num_kv_heads, self.head_dim = shape
        self.device = torch.device(device)
        self.kernels = kernels
        blocks = (num_layers, self.num_blocks + 1, self.num_kv_heads, self.block_size, self.head_dim)
        self.keys = _zeros(blocks, dtype, self.device)
        self.values = _zeros(blocks, dtype, self.device)
        self._gathered = self.keys.new_empty(2, 0, self.block_size * self.head_dim)
        self.num_layers_run = 0  # by all steps so far: how a long one gets on, read from another thread

    def count_layers(self, num_layers: int) -> None:
        """So many more have been attended in."""
        self.num_layers_run += num_layers

    def copy_blocks(self, copies: list[BlockCopy]) -> None:
        """One after the other, in all layers, with zeros behind: what the source has there may not be finite."""
        for source, target, num_tokens in copies:  # a few: one by one is faster than by index
            for blocks in (self.keys, self.values):
                blocks[:, target, :, :num_tokens] = blocks[:, source, :, :num_tokens]
                blocks[:, target, :, num_tokens:].zero_()

    def gather(self, layer: int, head_blocks: Tensor) -> list[Tensor]:
        """Keys and values of blocks, by `block id * kv_heads + head`: `[head blocks, block_size * head_dim]` each.

        Good until the next call: new memory at each would take longer than the copying.
        """
        num, width = len(head_blocks), self.block_size * self.head_dim
        if num > self._gathered.shape[1]:
            self._gathered = self.keys.new_empty(2, num * 5 // 4, width)
        return [
            torch.index_select(blocks[layer].view(-1, width), 0, head_blocks, out=into[:num])
            for blocks, into in zip((self.keys, self.values), self._gathered, strict=True)
        ]


def head_slots(block_ids: NDArray[np.int64], offsets: NDArray[np.int64], cache: PagedKVCache) -> NDArray[np.int64]:
    """The slots of `StepLayout`, from the block of each row and where it stands in there: `[rows]` each."""
    heads = block_ids[:, None] * cache.num_kv_heads + np.arange(cache.num_kv_heads)
    slots: NDArray[np.int64] = heads * cache.block_size + offsets[:, None]
    return slots.reshape(-1)


def write(keys: Tensor, values: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Puts `key` and `value`, `[rows, kv_heads, head_dim]`, into one layer's of the cache. `slots`: see StepLayout."""
    head_dim = key.shape[-1]
    for of_layer, new in ((keys, key), (values, value)):
        of_layer.view(-1, head_dim).index_copy_(0, slots, new.reshape(-1, head_dim))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros: what is masked must be finite. In main memory only pages that are written to take room."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Not torch.zeros, which writes them all: seconds at the start, and gigabytes that perhaps nobody will need.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
