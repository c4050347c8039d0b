"""The parts of a step for kernels that read the KV cache's blocks where they lie. Chosen in choice.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parleyd.model.upload import upload
from parleyd.scheduling.request import Scheduled

if TYPE_CHECKING:
    from parleyd.kernels.cache import PagedKVCache

# Tokens of a block, unless a kernel wants others.
BLOCK_SIZE = 32

# (query, keys, values, block table, lengths, scale) -> attended. query: [rows, heads, head_dim], one token of each
# sequence; keys, values: one layer's, [blocks, kv_heads, block_size, head_dim]; block table: [rows, blocks], int32;
# lengths: [rows], int32, the token's own included.
DecodeKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
# The same for the last tokens of each sequence: (query, keys, values, block table, lengths, starts, most tokens of one,
# scale). query: [tokens, heads, head_dim], end to end; starts: [sequences + 1], int32.
PrefillKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, float], Tensor]


class Kernels(NamedTuple):
    """What attends where there is something better than to gather the blocks; None where there is not.

    `takes_prompts`: `decode` attends for prompts too, for each row as if its sequence ended there.
    """

    decode: DecodeKernel | None = None
    prefill: PrefillKernel | None = None
    takes_prompts: bool = False


NO_KERNELS = Kernels()


@dataclass(frozen=True)
class PagedDecode:
    """The first rows, each attending to its sequence up to itself.

    `table`: `[rows, blocks]`, `lengths`: `[rows]`, both int32.
    """

    table: Tensor
    lengths: Tensor

    def attend(self, cache: PagedKVCache, layer: int, query: Tensor, scale: float) -> Tensor:
        """See Part."""
        assert cache.kernels.decode is not None
        query = query[: len(self.lengths)]
        return cache.kernels.decode(query, cache.keys[layer], cache.values[layer], self.table, self.lengths, scale)


@dataclass(frozen=True)
class PagedPrefill:
    """All rows from `row` on: stretches of prompts, each attending to its sequence up to its own end.

    `table`: `[stretches, blocks]`, `lengths`: `[stretches]`, `starts`: `[stretches + 1]`, all int32.
    """

    row: int
    table: Tensor
    lengths: Tensor
    starts: Tensor
    max_tokens: int

    @classmethod
    def of(cls, scheduled: list[Scheduled], row: int, table: NDArray[np.int32], device: torch.device) -> PagedPrefill:
        """`table`: see `block_table`."""
        num_tokens = np.array([item.num_tokens for item in scheduled], np.int32)
        lengths = np.array([item.start + item.num_tokens for item in scheduled], np.int32)
        starts = np.concatenate(([0], num_tokens.cumsum())).astype(np.int32)
        return cls(row, upload(table, device), upload(lengths, device), upload(starts, device), int(num_tokens.max()))

    def attend(self, cache: PagedKVCache, layer: int, query: Tensor, scale: float) -> Tensor:
        """See Part."""
        assert cache.kernels.prefill is not None
        keys, values = cache.keys[layer], cache.values[layer]
        return cache.kernels.prefill(
            query[self.row :], keys, values, self.table, self.lengths, self.starts, self.max_tokens, scale
        )


def block_table(scheduled: list[Scheduled], block_size: int) -> NDArray[np.int32]:
    """`[rows, blocks]`: the blocks of each row up to its end, then its first one: another's may hold NaN, and what a
    mask hides must be finite."""
    num_blocks = [-(-(item.start + item.num_tokens) // block_size) for item in scheduled]
    table = np.zeros((len(scheduled), max(num_blocks)), np.int32)
    for row, (item, num_own) in enumerate(zip(scheduled, num_blocks, strict=True)):
        table[row, :num_own] = item.block_ids[:num_own]
        table[row, num_own:] = item.block_ids[0]
    return table
