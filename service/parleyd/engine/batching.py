"""Engine `batching`: continuous batching over a paged KV cache. A step is schedule, run, commit."""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial

import torch

from parleyd.engine.model_runner import Launched, ModelRunner
from parleyd.generation import EngineRequest, EngineStats, Output
from parleyd.grammar.compiler import GrammarError
from parleyd.grammar.state import GrammarCompiler, GrammarState
from parleyd.scheduling.prefill_budget import PrefillBudget
from parleyd.scheduling.request import Batch
from parleyd.scheduling.scheduler import Scheduler

_logger = logging.getLogger("parleyd.engine")


# Failures in a row after which the model's state counts as broken, not the requests as bad: a CPU has no error that
# says so. One request can fail a step, and its retry the next; a new worker costs the others seconds.
_MAX_FAILURES_IN_A_ROW = 3


class BrokenStateError(RuntimeError):
    """Steps fail one after the other, whatever is in them."""


class BatchingEngine:
    """See `Engine`. Requests and aborts wait in an inbox for the thread that steps: it alone touches the scheduler."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        max_running: int,
        grammars: GrammarCompiler,
        budget: PrefillBudget | None = None,
        *,
        overlap: bool = False,
    ) -> None:
        """`budget`: the scheduler's, where it wants to know what steps cost; they must have run once they are launched.

        `overlap`: launch a step before the ids of the one ahead are here, so that a device never waits for us."""
        self.max_running = max_running
        self._budget = budget
        self._num_steps = 0
        self._max_ahead = 1 if overlap else 0
        self._in_flight: deque[tuple[Batch, Launched]] = deque()
        self._num_failures_in_a_row = 0
        self._scheduler = scheduler
        self._runner = runner
        self._grammars = grammars
        self._compiling: set[int] = set()  # keys of requests that are not in the inbox yet, and may be aborted
        self._inbox: queue.SimpleQueue[Callable[[], Output | None]] = queue.SimpleQueue()

    @property
    def progress(self) -> int:
        """See Engine."""
        return self._num_steps + self._runner.progress

    def submit(self, request: EngineRequest) -> None:
        """See Engine. A request with a grammar enters the inbox once that is compiled."""
        if not request.params.grammar:
            self._inbox.put(partial(self._scheduler.submit, request))
            return
        self._compiling.add(request.key)
        state = self._grammars.start(request)
        state.add_done_callback(lambda state: self._inbox.put(partial(self._submit_compiled, request, state)))

    def abort(self, key: int) -> None:
        """See Engine."""
        self._compiling.discard(key)
        self._inbox.put(partial(self._scheduler.abort, key))

    def stats(self) -> EngineStats:
        """See Engine."""
        return self._scheduler.stats()

    def step(self) -> list[Output]:
        """See Engine. Raises what broke the device or the model's state: no further step can succeed."""
        outputs: list[Output] = []
        while not outputs:
            # Not where the last of them fails: its requests' errors are delivered first.
            if self._num_failures_in_a_row >= _MAX_FAILURES_IN_A_ROW:
                raise BrokenStateError(f"{self._num_failures_in_a_row} steps failed one after the other")
            outputs += self._take_inbox()
            outputs += self._run_batch()
        return outputs

    def _run_batch(self) -> Iterator[Output]:
        self._num_steps += 1
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
            self._num_failures_in_a_row += 1
            yield from self._scheduler.fail(batch, f"{type(error).__name__}: {error}")
            return
        if self._budget is not None:
            num_prefill_tokens = batch.num_tokens - batch.num_decodes
            self._budget.observe(batch.num_decodes, num_prefill_tokens, time.perf_counter() - started)

    def _commit(self) -> list[Output]:
        batch, launched = self._in_flight.popleft()
        outputs = self._scheduler.commit(batch, *launched.wait())
        errors = [output.error for output in outputs if output.error is not None]
        if errors:
            _logger.error("of %d requests in a step %d failed: %s", len(outputs), len(errors), errors[0])
        # A step that has come to no token yet, of a long prompt, tells nothing.
        if outputs:
            self._num_failures_in_a_row = self._num_failures_in_a_row + 1 if len(errors) == len(outputs) else 0
        return outputs

    def _take_inbox(self) -> list[Output]:
        """Everything in the inbox; waits for something where there is nothing else to do."""
        outputs: list[Output | None] = []
        if self._scheduler.is_idle and not self._in_flight and self._inbox.empty():
            self._scheduler.check_integrity()
            outputs.append(self._inbox.get()())
        while not self._inbox.empty():
            outputs.append(self._inbox.get()())
        return [output for output in outputs if output is not None]

    def _submit_compiled(self, request: EngineRequest, compiled: Future[GrammarState]) -> Output | None:
        if request.key not in self._compiling:  # aborted
            return None
        self._compiling.discard(request.key)  # an abort between the two is in the inbox, behind this
        try:
            return self._scheduler.submit(request, compiled.result())
        except GrammarError as error:
            return Output(key=request.key, grammar_error=str(error))
        except Exception as error:
            _logger.exception("compiling the grammar of request %d failed", request.key)
            return Output(key=request.key, error=f"{type(error).__name__}: {error}")
