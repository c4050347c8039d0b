"""A step's flattened batch and what attends to which of its rows: decoding sequences first, then chunks of prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from parleyd.kernels.cache import PagedKVCache, head_slots, write
from parleyd.kernels.gathered import Gathered
from parleyd.kernels.paged import PagedDecode, PagedPrefill, block_table
from parleyd.model.upload import upload
from parleyd.scheduling.request import Batch


class Part(Protocol):
    """Consecutive rows of a step that are attended to together."""

    def attend(self, cache: PagedKVCache, layer: int, query: Tensor, scale: float) -> Tensor:
        """`query` is the step's; the result is of the part's rows, `[rows, heads, head_dim]`."""


@dataclass(frozen=True)
class StepLayout:
    """Where a step's rows belong.

    `slots`: `[rows * kv_heads]`, where each row's keys go in a layer seen as `[.., head_dim]`. `parts`: all the rows.
    """

    slots: Tensor
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, batch: Batch, cache: PagedKVCache) -> StepLayout:
        """The layout of a batch, on the cache's device."""
        kernels, scheduled = cache.kernels, batch.scheduled
        table = block_table(scheduled, cache.block_size)
        entries = np.arange(len(scheduled)).repeat([item.num_tokens for item in scheduled])
        positions = np.frombuffer(batch.positions(), np.int64)
        parts: list[Part] = []
        num_decodes = len(scheduled) if kernels.takes_prompts else batch.num_decodes
        row = batch.num_tokens if kernels.takes_prompts else num_decodes
        if num_decodes and kernels.decode is not None:
            lengths = positions[:row].astype(np.int32) + 1
            parts.append(PagedDecode(upload(table[entries[:row]], cache.device), upload(lengths, cache.device)))
        else:
            parts += Gathered.of_decodes(scheduled[:num_decodes], cache)
        prefills = scheduled[num_decodes:]
        if prefills and kernels.prefill is not None:
            parts.append(PagedPrefill.of(prefills, row, table[num_decodes:], cache.device))
        else:
            for item in prefills:
                parts.append(Gathered.of([item], row, cache))
                row += item.num_tokens
        block_ids = table[entries, positions // cache.block_size].astype(np.int64)
        slots = head_slots(block_ids, positions % cache.block_size, cache)
        return cls(upload(slots, cache.device), tuple(parts))

    @property
    def paged_decode(self) -> PagedDecode | None:
        """The part that has all rows, where they attend so."""
        part = self.parts[0]
        return part if len(self.parts) == 1 and isinstance(part, PagedDecode) else None


def attend(
    cache: PagedKVCache, layer: int, layout: StepLayout, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Writes `key` and `value` (`[rows, kv_heads, head_dim]`) into the cache, and attends.

    `query`: `[rows, heads, head_dim]`, as is the result.
    """
    write(cache.keys[layer], cache.values[layer], layout.slots, key, value)
    return attend_to_written(cache, layer, layout, query, scale)


def attend_to_written(cache: PagedKVCache, layer: int, layout: StepLayout, query: Tensor, scale: float) -> Tensor:
    """See `attend`; the keys and values are in the cache already."""
    cache.count_layers(1)
    parts = [part.attend(cache, layer, query, scale) for part in layout.parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
