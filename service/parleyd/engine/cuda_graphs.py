"""Decode steps as CUDA graphs: one launch a step instead of hundreds, which take a GPU longer to start than to run.

A graph is of a fixed number of rows and reads fixed buffers. A step is copied into the buffers and padded to the next
larger graph with rows of a sequence that is nobody's: one token long, in the cache's scratch block.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parleyd.engine.model_runner import Forward
from parleyd.kernels.cache import PagedKVCache, head_slots
from parleyd.kernels.layout import StepLayout
from parleyd.kernels.paged import PagedDecode
from parleyd.model.upload import upload

_logger = logging.getLogger("parleyd.engine")

# Runs again what was captured, on what is in its buffers now, and returns its output.
Replay = Callable[[], Tensor]
# Captures a function that reads fixed buffers.
Capture = Callable[[Callable[[], Tensor]], Replay]


class CudaCapture:
    """A Capture into CUDA graphs, whose memory they share: one runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        """Runs it before, for what is made on first use."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = run()
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


@dataclass(frozen=True)
class _Buffers:
    """What the graphs read: the inputs of up to as many rows as the largest has, at first all of them nobody's."""

    input_ids: Tensor  # [rows]
    positions: Tensor  # [rows]
    slots: Tensor  # [rows, kv_heads]
    table: Tensor  # [rows, blocks of a full context], int32
    lengths: Tensor  # [rows], int32
    nobody_slots: Tensor  # [kv_heads]
    nobody_block: int

    @classmethod
    def of(cls, cache: PagedKVCache, num_rows: int, max_context_tokens: int) -> _Buffers:
        device, scratch = cache.device, cache.num_blocks
        slots = upload(head_slots(np.array([scratch]), np.zeros(1, np.int64), cache), device)
        ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        num_blocks = -(-max_context_tokens // cache.block_size)
        table = torch.full((num_rows, num_blocks), scratch, dtype=torch.int32, device=device)
        lengths = torch.ones(num_rows, dtype=torch.int32, device=device)
        return cls(ids, ids.clone(), slots.repeat(num_rows, 1), table, lengths, slots, scratch)

    def load(self, input_ids: Tensor, positions: Tensor, slots: Tensor, decode: PagedDecode, size: int) -> None:
        """A step's rows, and nobody's from there to `size`."""
        num_rows = len(input_ids)
        self.input_ids[:num_rows].copy_(input_ids)
        self.positions[:num_rows].copy_(positions)
        self.slots[:num_rows].copy_(slots.view(num_rows, -1))
        self.table[:num_rows, : decode.table.shape[1]].copy_(decode.table)
        self.lengths[:num_rows].copy_(decode.lengths)
        padding = slice(num_rows, size)
        self.input_ids[padding].zero_()
        self.positions[padding].zero_()
        self.slots[padding].copy_(self.nobody_slots)
        self.table[padding, 0].fill_(self.nobody_block)
        self.lengths[padding].fill_(1)


class GraphedForward:
    """A Forward that replays steps of decodes alone, and leaves all others to the one it was made of."""

    def __init__(
        self,
        forward: Forward,
        cache: PagedKVCache,
        *,
        max_rows: int,
        max_context_tokens: int,
        capture: Capture,
    ) -> None:
        """Captures all graphs. Raises what capturing raises."""
        self._forward = forward
        self._buffers = _Buffers.of(cache, max_rows, max_context_tokens)
        self._rows = torch.arange(max_rows, device=cache.device)
        self._sizes = graph_sizes(max_rows)
        self._replays: dict[int, Replay] = {}
        started = time.monotonic()
        # The largest first, so that the others find room in the memory that it has taken.
        for size in reversed(self._sizes):
            self._replays[size] = capture(partial(self._run, size))
            _logger.info("CUDA graphs: %d of %d captured", len(self._replays), len(self._sizes))
        _logger.info("CUDA graphs: ready after %.1f s", time.monotonic() - started)

    @property
    def progress(self) -> int:
        """See Forward. A replay adds nothing."""
        return self._forward.progress

    def __call__(self, input_ids: Tensor, positions: Tensor, layout: StepLayout, sample_rows: Tensor) -> Tensor:
        """See Forward. The result is good until the next call."""
        num_rows = len(input_ids)
        decode = layout.paged_decode
        size = next((size for size in self._sizes if size >= num_rows), None)
        if size is None or decode is None:
            return self._forward(input_ids, positions, layout, sample_rows)
        self._buffers.load(input_ids, positions, layout.slots, decode, size)
        return self._replays[size]()[:num_rows]

    @torch.inference_mode()
    def _run(self, size: int) -> Tensor:
        buffers = self._buffers
        decode = PagedDecode(buffers.table[:size], buffers.lengths[:size])
        layout = StepLayout(buffers.slots[:size].view(-1), (decode,))
        return self._forward(buffers.input_ids[:size], buffers.positions[:size], layout, self._rows[:size])


def graph_sizes(max_rows: int) -> list[int]:
    """How many rows the graphs have: few more than a step needs, so that padding costs little."""
    return [size for size in (1, 2, 4, *range(8, max_rows, 8)) if size < max_rows] + [max_rows]
