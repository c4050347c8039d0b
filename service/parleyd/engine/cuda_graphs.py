"""Decode steps as CUDA graphs: one launch a step instead of hundreds, which take a GPU longer to start than to run.

A graph is of a fixed number of rows and reads fixed buffers. A step is copied into the buffers and padded to the next
larger graph with rows of a sequence that is nobody's: one token long, in the cache's scratch block.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from functools import partial

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
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # one: on each, cuBLAS keeps memory

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        """Runs it before, for what is made on first use. Raises RuntimeError where it waits for the device."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
            # Found out ahead: in a capture, waiting is an error of the device, after which nothing goes on.
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # of a prototype, says torch
                torch.cuda.set_sync_debug_mode("error")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            output = run()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


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
        num_blocks, scratch = -(-max_context_tokens // cache.block_size), np.array([cache.num_blocks])
        # What a row of nobody's has: input id, position, slots, block table and length.
        nobody = (
            np.zeros(1, np.int64),
            np.zeros(1, np.int64),
            head_slots(scratch, np.zeros(1, np.int64), cache),
            scratch.repeat(num_blocks).astype(np.int32),
            np.ones(1, np.int32),
        )
        self._nobody = [upload(one, cache.device) for one in nobody]
        self._buffers = [one.repeat(max_rows, 1) for one in self._nobody]
        self._rows = torch.arange(max_rows, device=cache.device)
        self._sizes = graph_sizes(max_rows)
        self._replays: dict[int, Replay] = {}
        started = time.monotonic()
        # The largest first, so that the others find room in the memory that it has taken.
        for size in reversed(self._sizes):
            self._replays[size] = capture(partial(self._run, size))
            _logger.info("CUDA graphs: %d of %d captured", len(self._replays), len(self._sizes))
        _logger.info("CUDA graphs: ready after %.1f s", time.monotonic() - started)

    def __call__(self, input_ids: Tensor, positions: Tensor, layout: StepLayout, sample_rows: Tensor) -> Tensor:
        """See Forward. The result is good until the next call."""
        num_rows = len(input_ids)
        decode = layout.paged_decode
        size = next((size for size in self._sizes if size >= num_rows), None)
        if size is None or decode is None:
            return self._forward(input_ids, positions, layout, sample_rows)
        inputs = (input_ids, positions, layout.slots, decode.table, decode.lengths)
        for buffer, rows, nobody in zip(self._buffers, inputs, self._nobody, strict=True):
            rows = rows.view(num_rows, -1)
            buffer[:num_rows, : rows.shape[1]].copy_(rows)
            buffer[num_rows:size].copy_(nobody)
        return self._replays[size]()[:num_rows]

    @torch.inference_mode()
    def _run(self, size: int) -> Tensor:
        input_ids, positions, slots, table, lengths = (buffer[:size] for buffer in self._buffers)
        layout = StepLayout(slots.view(-1), (PagedDecode(table, lengths.view(-1)),))
        return self._forward(input_ids.view(-1), positions.view(-1), layout, self._rows[:size])


def graph_sizes(max_rows: int) -> list[int]:
    """How many rows the graphs have: few more than a step needs, so that padding costs little."""
    return [size for size in (1, 2, 4, *range(8, max_rows, 8)) if size < max_rows] + [max_rows]
