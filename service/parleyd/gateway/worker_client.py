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
# From here on a request is not to blame for its worker's death: one token came out of its prefill, one out of a decode.
_NUM_SETTLED = 2


@dataclass(eq=False)
class _OpenRequest:
    """A request and what has become of it. `made_ids` are those that any worker so far has made for it."""

    request: EngineRequest
    streamer: Streamer
    call: Call
    last_token_time: float | None = None  # on the monotonic clock
    made_ids: array[int] = field(default_factory=lambda: array("i"))
    is_submitted: bool = False  # to the attached worker
    num_made: int = 0  # tokens that it has made
    num_strikes: int = 0  # workers in a row that died when it alone could be to blame

    @property
    def remainder(self) -> EngineRequest:
        """What is left to generate."""
        return replace(self.request, output_ids=self.request.output_ids + tuple(self.made_ids))


class WorkerClient:
    """Generates through whichever worker is attached; between two, requests wait.

    Requests that had not settled when a worker died are suspects. Each is tried while nobody else is unsettled, so that
    another death tells who is to blame; newcomers and suspects take turns, so that neither keeps the others out.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.num_handed_over = 0
        self._metrics = metrics
        self._keys = itertools.count()
        self._link: WorkerLink | None = None
        self._open: dict[int, _OpenRequest] = {}
        # Of these, by key: not submitted yet; submitted and not settled; suspects, submitted or not.
        self._newcomers: dict[int, _OpenRequest] = {}
        self._unsettled: dict[int, _OpenRequest] = {}
        self._suspects: dict[int, _OpenRequest] = {}
        self._is_suspects_turn = False

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
        self._newcomers[request.key] = entry
        self._observe_start(entry)
        self._go_on()
        try:
            while True:
                delta = await entry.streamer.take()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            # Forgotten by then if the worker ended it; else nobody waits for it any more.
            if request.key in self._open:
                self._forget(request.key)
                if self._link is not None and entry.is_submitted:
                    self._link.send(Abort(request.key))
                on_end()
                self._go_on()

    def next_key(self) -> int:
        """A key that no other request of this gateway has."""
        return next(self._keys)

    def dispatch(self, outputs: list[Output]) -> None:
        """Hands one step's outputs to their streamers; those of requests aborted meanwhile have none."""
        now = time.monotonic()
        self._metrics.batch_size.observe(len(outputs))
        for output in outputs:
            entry = self._open.get(output.key)
            if entry is None:
                continue
            if output.token_ids:
                entry.made_ids.extend(output.token_ids)
                entry.num_made += len(output.token_ids)
                self._observe_token(entry, now)
            if output.is_last:
                self._forget(output.key)
            elif output.key in self._unsettled and entry.num_made >= _NUM_SETTLED:
                self._settle(entry)
            entry.streamer.put(output)
        self._go_on()

    def attach(self, link: WorkerLink) -> None:
        """Hands every open request to a fresh worker, suspects one by one once all others have settled."""
        self._link = link
        self._go_on()

    def detach(self) -> bool:
        """The worker is gone: its requests wait for the next. Returns whether one of them was found to be the cause.

        A request is blamed if it had not settled. Where it is the only one so often that chance is no explanation, it
        fails, so that the others can go on.
        """
        self._link = None
        blamed, self._unsettled = self._unsettled, {}
        self.num_handed_over += sum(entry.is_submitted for entry in self._open.values())
        for entry in self._open.values():
            entry.is_submitted, entry.num_made = False, 0
        self._suspects |= blamed
        self._newcomers = {key: entry for key, entry in self._open.items() if key not in self._suspects}
        self._is_suspects_turn = False
        if len(blamed) != 1:
            return False
        (culprit,) = blamed.values()
        culprit.num_strikes += 1
        if culprit.num_strikes < _MAX_STRIKES:
            return False
        _logger.error(
            "request %s (%d) has killed %d workers: it fails",
            culprit.call.request_id, culprit.request.key, culprit.num_strikes,
        )  # fmt: skip
        self._forget(culprit.request.key)
        culprit.streamer.fail(EngineFault(f"request {culprit.request.key} kills the worker"))
        return True

    def fail_all(self, error: ParleyError) -> None:
        """Ends every open request."""
        entries, self._open = self._open, {}
        self._newcomers, self._unsettled, self._suspects = {}, {}, {}
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

    def _go_on(self) -> None:
        """Submits whoever's turn it is."""
        if self._link is None:
            return
        if self._suspects:
            if self._unsettled:
                return  # another death would leave a doubt about who is to blame
            if self._is_suspects_turn or not self._newcomers:
                self._is_suspects_turn = False
                self._submit(self._link, min(self._suspects.values(), key=lambda entry: entry.num_strikes))
                return
            self._is_suspects_turn = True
        newcomers, self._newcomers = self._newcomers, {}
        for entry in newcomers.values():
            self._submit(self._link, entry)

    def _submit(self, link: WorkerLink, entry: _OpenRequest) -> None:
        entry.is_submitted = True
        self._unsettled[entry.request.key] = entry
        link.send(Submit(entry.remainder))

    def _settle(self, entry: _OpenRequest) -> None:
        entry.num_strikes = 0
        del self._unsettled[entry.request.key]
        self._suspects.pop(entry.request.key, None)

    def _forget(self, key: int) -> None:
        for group in (self._open, self._newcomers, self._unsettled, self._suspects):
            group.pop(key, None)
