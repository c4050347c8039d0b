"""Engine `batching`: continuous batching over a paged KV cache. A step is schedule, run, commit."""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Iterator

import torch

from parleyd.engine.model_runner import Launched, ModelRunner
from parleyd.engine.prefill_budget import PrefillBudget
from parleyd.engine.request import Batch
from parleyd.engine.scheduler import Scheduler
from parleyd.generation import EngineRequest, EngineStats, Output

_logger = logging.getLogger("parleyd.engine")


class BatchingEngine:
    """See `Engine`. Requests and aborts wait in an inbox for the thread that steps: it alone touches the scheduler."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        max_running: int,
        budget: PrefillBudget | None = None,
        *,
        overlap: bool = False,
    ) -> None:
        """`budget`: the scheduler's, where it wants to know what steps cost; they must have run once they are launched.

        `overlap`: launch a step before the ids of the one ahead are here, so that a device never waits for us.
        """
        self.max_running = max_running
        self._budget = budget
        self.progress = 0
        self._max_ahead = 1 if overlap else 0
        self._in_flight: deque[tuple[Batch, Launched]] = deque()
        self._scheduler = scheduler
        self._runner = runner
        self._inbox: queue.SimpleQueue[EngineRequest | int] = queue.SimpleQueue()

    def submit(self, request: EngineRequest) -> None:
        """See Engine."""
        self._inbox.put(request)

    def abort(self, key: int) -> None:
        """See Engine."""
        self._inbox.put(key)

    def stats(self) -> EngineStats:
        """See Engine."""
        return self._scheduler.stats()

    def step(self) -> list[Output]:
        """See Engine. Raises what broke the device, after which no further step can succeed."""
        outputs: list[Output] = []
        while not outputs:
            outputs += self._take_inbox()
            outputs += self._run_batch()
        return outputs

    def _run_batch(self) -> Iterator[Output]:
        self.progress += 1
        batch = self._scheduler.schedule()
        if batch is not None:
            yield from self._launch(batch)
        # With nothing to launch there is nothing to do but wait.
        if len(self._in_flight) > (self._max_ahead if batch is not None else 0):
            yield from self._commit()

    def _launch(self, batch: Batch) -> Iterator[Output]:
        started = time.perf_counter()
        try:
            self._in_flight.append((batch, self._runner.launch(batch)))
        except torch.AcceleratorError:
            raise
        except Exception as error:
            _logger.exception("a step of %d tokens failed", batch.num_tokens)
            while self._in_flight:
                yield from self._commit()
            yield from self._scheduler.fail(batch, f"{type(error).__name__}: {error}")
            return
        if self._budget is not None:
            num_prefill_tokens = batch.num_tokens - batch.num_decodes
            self._budget.observe(batch.num_decodes, num_prefill_tokens, time.perf_counter() - started)

    def _commit(self) -> list[Output]:
        batch, launched = self._in_flight.popleft()
        return self._scheduler.commit(batch, *launched.wait())

    def _take_inbox(self) -> Iterator[Output]:
        """Everything in the inbox; waits for something where there is nothing else to do."""
        if self._scheduler.is_idle and not self._in_flight and self._inbox.empty():
            self._scheduler.check_integrity()
            yield from self._take(self._inbox.get())
        while not self._inbox.empty():
            yield from self._take(self._inbox.get())

    def _take(self, item: EngineRequest | int) -> Iterator[Output]:
        if isinstance(item, int):
            self._scheduler.abort(item)
        elif (output := self._scheduler.submit(item)) is not None:
            yield output
