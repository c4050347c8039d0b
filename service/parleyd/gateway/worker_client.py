"""Requests to the worker and their outputs back: one streamer a request, found by the request's key.

Outlives workers: when one dies, the next is given what its open requests still lack, and their readers see a pause.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from array import array
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field, replace

from parleyd.errors import EngineFault, ParleyError
from parleyd.gateway.streamer import Delta, Streamer
from parleyd.gateway.worker_link import WorkerLink
from parleyd.generation import EngineRequest, Output
from parleyd.telemetry.call import Call, current_call
from parleyd.telemetry.metrics import Metrics

_logger = logging.getLogger("parleyd.worker")

_MAX_STRIKES = 2
# From here on a request is not to blame for its worker's death: one token came out of its prefill, one out of a decode.
_NUM_SETTLED = 2
# So long a trial keeps others waiting: the prefill of most prompts is over by then, and clients with a deadline of five
# seconds still get an answer. Twice as long for each trial of its own that a request has outstayed.
_TRIAL_S = 3.0


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
    num_strikes: int = 0  # workers in a row that died when nobody was likelier to be to blame
    num_deaths: int = 0  # workers in a row that died before it had settled
    num_outstayed: int = 0  # trials of its own at whose end it had not settled

    @property
    def remainder(self) -> EngineRequest:
        """What is left to generate."""
        return replace(self.request, output_ids=self.request.output_ids + tuple(self.made_ids))


class WorkerClient:
    """Generates through whichever worker is attached; between two, requests wait.

    Requests that had not settled when a worker died are suspects. Each is tried while nobody else is unsettled, so that
    another death tells who is to blame; newcomers and suspects take turns, so that neither keeps the others out. Nor
    does one that makes no token: a trial that takes too long ends, and the next begins beside it. Of several that a
    death finds unsettled, those are to blame that most deaths have found so.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.num_handed_over = 0
        self._metrics = metrics
        self._keys = itertools.count()
        self._link: WorkerLink | None = None
        self._open: dict[int, _OpenRequest] = {}
        # Of these, by key: not submitted yet; suspects, not submitted yet; submitted and not settled; of the last,
        # those for whose sake all others wait.
        self._newcomers: dict[int, _OpenRequest] = {}
        self._suspects: dict[int, _OpenRequest] = {}
        self._unsettled: dict[int, _OpenRequest] = {}
        self._on_trial: dict[int, _OpenRequest] = {}
        self._trial_end: asyncio.TimerHandle | None = None
        self._is_suspects_turn = False

    @property
    def num_open(self) -> int:
        """Requests that a worker is generating for, or will."""
        return len(self._open)

    async def generate(
        self,
        request: EngineRequest,
        on_end: Callable[[], None] = lambda: None,
        grammar_field: str = "",
        *,
        interval: int = 1,
    ) -> AsyncGenerator[Delta]:
        """Yields the answer's token ids as they come. Closing the generator early stops the worker within one token.

        `on_end` is called once the worker is done with the request, however much of it its reader has taken by then.
        `grammar_field`, `interval`: see Streamer.
        Raises EngineFault, or whatever else ended the request.
        """
        streamer = Streamer(on_end, grammar_field, interval=interval)
        entry = self._open[request.key] = _OpenRequest(request, streamer, current_call.get())
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
                    self._link.abort(request.key)
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

        A request is suspected if it had not settled. Where it is the likeliest so often that chance is no explanation,
        it fails, so that the others can go on.
        """
        self._link = None
        self._set_on_trial({})
        unsettled, self._unsettled = self._unsettled, {}
        self.num_handed_over += sum(entry.is_submitted for entry in self._open.values())
        for entry in self._open.values():
            entry.is_submitted, entry.num_made = False, 0
        self._suspects |= unsettled
        self._newcomers = {key: entry for key, entry in self._open.items() if key not in self._suspects}
        self._is_suspects_turn = False
        likeliest = _likeliest(unsettled.values())
        for entry in unsettled.values():
            entry.num_deaths += 1
        if len(likeliest) != 1:
            return False
        (culprit,) = likeliest
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
        self._newcomers, self._suspects, self._unsettled = {}, {}, {}
        self._set_on_trial({})
        for entry in entries.values():
            entry.streamer.fail(error)

    def _observe_start(self, entry: _OpenRequest) -> None:
        call, request = entry.call, entry.request
        if call.queue_s is not None:
            return  # a further choice of the same request
        call.queue_s = call.elapsed()
        self._metrics.queue_seconds.observe(call.queue_s)
        self._metrics.prompt_tokens.observe(len(request.prompt_ids))
        if request.output_ids:
            self._metrics.resumed.inc()

    def _observe_token(self, entry: _OpenRequest, now: float) -> None:
        call = entry.call
        if call.first_token_s is None:
            call.first_token_s = now - call.arrived
            self._metrics.first_token_seconds.observe(call.first_token_s)
        elif entry.last_token_time is not None:
            self._metrics.token_seconds.observe(now - entry.last_token_time)
        entry.last_token_time = now

    def _go_on(self) -> None:
        """Submits whoever's turn it is."""
        if self._link is None or self._on_trial:
            return  # while one is on trial, another death would leave a doubt about who is to blame
        if self._suspects and (self._is_suspects_turn or not self._newcomers):
            self._is_suspects_turn = False
            # The likeliest first: of several culprits one after the other is found, before too many workers are lost.
            suspect = min(self._suspects.values(), key=lambda entry: (entry.num_outstayed, -entry.num_strikes))
            del self._suspects[suspect.request.key]
            self._set_on_trial({suspect.request.key: suspect})
            self._submit(self._link, suspect)
            return
        newcomers, self._newcomers = self._newcomers, {}
        if self._suspects:
            self._is_suspects_turn = True
            self._set_on_trial(dict(newcomers))
        for entry in newcomers.values():
            self._submit(self._link, entry)

    def _set_on_trial(self, entries: dict[int, _OpenRequest]) -> None:
        """Begins a trial, and has it end in time; without entries, ends the one there is."""
        self._on_trial = entries
        if self._trial_end is not None:
            self._trial_end.cancel()
            self._trial_end = None
        if entries:
            limit_s = _TRIAL_S * 2 ** min(entry.num_outstayed for entry in entries.values())
            self._trial_end = asyncio.get_running_loop().call_later(limit_s, self._end_trial)

    def _end_trial(self) -> None:
        """Others need wait no longer; those on trial stay, and stay unsettled."""
        if len(self._on_trial) == len(self._unsettled):  # else those that were there before may hold it up
            for entry in self._on_trial.values():
                entry.num_outstayed += 1
        self._set_on_trial({})
        self._go_on()

    def _submit(self, link: WorkerLink, entry: _OpenRequest) -> None:
        entry.is_submitted = True
        self._unsettled[entry.request.key] = entry
        link.submit(entry.remainder)

    def _settle(self, entry: _OpenRequest) -> None:
        entry.num_strikes, entry.num_deaths, entry.num_outstayed = 0, 0, 0
        del self._unsettled[entry.request.key]
        self._on_trial.pop(entry.request.key, None)

    def _forget(self, key: int) -> None:
        for group in (self._open, self._newcomers, self._suspects, self._unsettled, self._on_trial):
            group.pop(key, None)


def _likeliest(unsettled: Iterable[_OpenRequest]) -> list[_OpenRequest]:
    """Those whom earlier deaths speak against most."""
    by_evidence: defaultdict[tuple[int, int], list[_OpenRequest]] = defaultdict(list)
    for entry in unsettled:
        by_evidence[entry.num_strikes, entry.num_deaths].append(entry)
    return by_evidence[max(by_evidence)] if by_evidence else []
