"""Requests to the worker and their outputs back: one streamer a request, found by the request's key.

Outlives workers: when one dies, the next is given what its open requests still lack, and their readers see a pause.
"""

from __future__ import annotations

import itertools
import logging
import time
from array import array
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace

from parleyd.errors import EngineFault, ParleyError
from parleyd.gateway.streamer import Delta, Streamer
from parleyd.gateway.worker_link import WorkerLink
from parleyd.generation import EngineRequest, Output
from parleyd.ipc.messages import Abort, Submit
from parleyd.telemetry.call import Call, current_call
from parleyd.telemetry.metrics import Metrics

_logger = logging.getLogger("parleyd.worker")

_MAX_STRIKES = 2


@dataclass(eq=False)
class _OpenRequest:
    """A request and what has become of it. `made_ids` are those that any worker so far has made for it."""

    request: EngineRequest
    streamer: Streamer
    call: Call
    last_token_time: float | None = None  # on the monotonic clock
    made_ids: array[int] = field(default_factory=lambda: array("i"))
    is_submitted: bool = False  # to the attached worker
    has_progressed: bool = False  # there
    is_suspect: bool = False  # of having killed a worker: it was there, and had no token from it yet
    num_strikes: int = 0  # workers that died when it alone could be to blame

    @property
    def remainder(self) -> EngineRequest:
        """What is left to generate."""
        return replace(self.request, output_ids=self.request.output_ids + tuple(self.made_ids))


class WorkerClient:
    """Generates through whichever worker is attached; between two, requests wait."""

    def __init__(self, metrics: Metrics) -> None:
        self.num_handed_over = 0
        self._metrics = metrics
        self._keys = itertools.count()
        self._link: WorkerLink | None = None
        self._open: dict[int, _OpenRequest] = {}

    @property
    def num_open(self) -> int:
        """Requests that a worker is generating for, or will."""
        return len(self._open)

    async def generate(
        self, request: EngineRequest, on_end: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[Delta]:
        """Yields the answer's token ids as they come. Closing the generator early stops the worker within one token.

        `on_end` is called once the worker is done with the request, however much of it its reader has taken by then.
        Raises EngineFault, or whatever else ended the request.
        """
        entry = self._open[request.key] = _OpenRequest(request, Streamer(on_end), current_call.get())
        self._observe_start(entry)
        self._submit(entry)
        try:
            while True:
                delta = await entry.streamer.take()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            # Forgotten by then if the worker ended it; else nobody waits for it any more.
            if self._open.pop(request.key, None) is not None:
                if self._link is not None and entry.is_submitted:
                    self._link.send(Abort(request.key))
                on_end()
                self._try_suspect()

    def next_key(self) -> int:
        """A key that no other request of this gateway has."""
        return next(self._keys)

    def dispatch(self, outputs: list[Output]) -> None:
        """Hands one step's outputs to their streamers; those of requests aborted meanwhile have none."""
        now = time.monotonic()
        self._metrics.batch_size.observe(len(outputs))
        for output in outputs:
            entry = self._open.pop(output.key, None) if output.is_last else self._open.get(output.key)
            if entry is None:
                continue
            if output.token_ids:
                entry.made_ids.extend(output.token_ids)
                self._observe_token(entry, now)
            entry.streamer.put(output)
            if not entry.has_progressed:
                entry.has_progressed, entry.is_suspect = True, False
                self._try_suspect()

    def attach(self, link: WorkerLink) -> None:
        """Hands every open request to a fresh worker, suspects one by one once all others are under way."""
        self._link = link
        for entry in self._open.values():
            if not entry.is_suspect:
                self._submit(entry)
        self._try_suspect()

    def detach(self) -> bool:
        """The worker is gone: its requests wait for the next. Returns whether one of them was found to be the cause.

        A request is blamed if it was there without a token from this worker. Where it is the only one so often that
        chance is no explanation, it fails, so that the others can go on.
        """
        self._link = None
        blamed = [entry for entry in self._open.values() if entry.is_submitted and not entry.has_progressed]
        self.num_handed_over += sum(entry.is_submitted for entry in self._open.values())
        for entry in self._open.values():
            entry.is_submitted = entry.has_progressed = False
        for entry in blamed:
            entry.is_suspect = True
        if len(blamed) != 1:
            return False
        (culprit,) = blamed
        culprit.num_strikes += 1
        if culprit.num_strikes < _MAX_STRIKES:
            return False
        _logger.error("request %d has killed %d workers: it fails", culprit.request.key, culprit.num_strikes)
        del self._open[culprit.request.key]
        culprit.streamer.fail(EngineFault(f"request {culprit.request.key} kills the worker"))
        return True

    def fail_all(self, error: ParleyError) -> None:
        """Ends every open request."""
        entries, self._open = self._open, {}
        for entry in entries.values():
            entry.streamer.fail(error)

    def _observe_start(self, entry: _OpenRequest) -> None:
        call, request = entry.call, entry.request
        call.queue_s = call.queue_s or call.elapsed()
        self._metrics.queue_seconds.observe(call.queue_s)
        self._metrics.prompt_tokens.observe(len(request.prompt_ids))
        if request.output_ids:
            self._metrics.resumed.inc()

    def _observe_token(self, entry: _OpenRequest, now: float) -> None:
        if entry.last_token_time is None:
            call = entry.call
            call.first_token_s = call.first_token_s or now - call.arrived
            self._metrics.first_token_seconds.observe(now - call.arrived)
        else:
            self._metrics.token_seconds.observe(now - entry.last_token_time)
        entry.last_token_time = now

    def _submit(self, entry: _OpenRequest) -> None:
        if self._link is not None:
            entry.is_submitted = True
            self._link.send(Submit(entry.remainder))

    def _try_suspect(self) -> None:
        """Submits the next suspect, unless the worker's death would leave a doubt about who is to blame."""
        if self._link is None or any(entry.is_submitted and not entry.has_progressed for entry in self._open.values()):
            return
        suspects = [entry for entry in self._open.values() if entry.is_suspect]
        if suspects:
            self._submit(min(suspects, key=lambda entry: entry.num_strikes))
