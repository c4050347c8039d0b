"""Requests and the workers that come and go beneath them, in any order: against a model that knows what should be."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest.mock import patch

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from parleyd.gateway import worker_client
from parleyd.gateway.worker_client import WorkerClient
from tests.support.worker_readers import METRICS, Reader, Worker


class WorkersComeAndGo(RuleBasedStateMachine):
    """Any order of arrivals, cancellations, steps, deaths, trials that end; in the end everyone is served."""

    def __init__(self) -> None:
        super().__init__()
        self.no_end = patch.object(worker_client, "_TRIAL_S", 1e6)  # but by the rule below
        self.no_end.start()
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self.client = WorkerClient(METRICS)
        self.worker: Worker | None = None
        self.readers: list[Reader] = []
        self.expected: dict[int, int] = {}  # key: ids dispatched
        self.poisoned: set[int] = set()
        self.deaths: Counter[int] = Counter()  # key: deaths in a row that found it unsettled
        self.outstayed: set[int] = set()  # keys whose trial by this worker has ended

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        async def call() -> None:
            function(*arguments)

        self.loop.run_until_complete(call())

    def _settle(self) -> None:
        for _ in range(4):
            self.loop.run_until_complete(asyncio.sleep(0))

    @rule()
    def arrive(self) -> None:
        self.readers.append(self.loop.run_until_complete(self._arrive()))
        self._settle()

    async def _arrive(self) -> Reader:
        return Reader(self.client)

    @precondition(lambda self: self.worker is None)
    @rule()
    def attach(self) -> None:
        self.worker = Worker()
        self.outstayed.clear()
        self._call(self.client.attach, self.worker)

    @precondition(lambda self: self.client._on_trial)
    @rule()
    def end_trial(self) -> None:
        self.outstayed |= self.client._on_trial.keys()
        self._call(self.client._end_trial)

    @precondition(lambda self: self.worker is not None)
    @rule()
    def die(self) -> None:
        assert self.worker is not None
        unsettled = self._unsettled()
        self.deaths.update(unsettled)
        self.worker = None
        if self.client.detach():
            (culprit,) = unsettled - self.client._open.keys()
            assert self.deaths[culprit] >= 2
            assert len(unsettled) == 1 or self.outstayed  # nobody is blamed while there is a doubt
            self.poisoned.add(culprit)
        self._settle()

    def _unsettled(self) -> set[int]:
        worker = self.worker
        return set() if worker is None else {key for key in worker.open if worker.num_made[key] < 2}

    @precondition(lambda self: self.worker is not None and self.worker.open)
    @rule(data=st.data(), last=st.booleans())
    def step(self, data: Any, last: bool) -> None:
        worker = self.worker
        assert worker is not None
        keys = data.draw(st.lists(st.sampled_from(sorted(worker.open)), min_size=1, unique=True))
        self._dispatch(worker, keys, last=last)

    def _dispatch(self, worker: Worker, keys: list[int], *, last: bool) -> None:
        for key in keys:
            self.expected[key] = worker.open[key] + 1
        self._call(self.client.dispatch, [worker.make(key, last=last) for key in keys])
        for key in keys:
            if worker.num_made[key] >= 2:
                del self.deaths[key]
        self._settle()

    @precondition(lambda self: any(not reader.task.done() for reader in self.readers))
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        reader = data.draw(st.sampled_from([reader for reader in self.readers if not reader.task.done()]))
        reader.task.cancel()
        with suppress(asyncio.CancelledError):
            self.loop.run_until_complete(reader.task)
        assert self.worker is None or reader.key not in self.worker.open

    @invariant()
    def no_id_is_lost_or_doubled_and_each_request_ends_once(self) -> None:
        for reader in self.readers:
            assert reader.ids == list(range(len(reader.ids)))
            if not reader.task.cancelled():
                assert len(reader.ids) == self.expected.get(reader.key, 0)
                assert (reader.error is not None) == (reader.key in self.poisoned)
            assert reader.num_ends == reader.task.done()
        assert self.client.num_open == sum(not reader.task.done() for reader in self.readers)

    @invariant()
    def a_suspect_is_tried_alone(self) -> None:
        if self.worker is not None:
            in_doubt = self._unsettled() - self.outstayed
            assert len(in_doubt) == 1 or not self.deaths.keys() & in_doubt
            is_anyone_waiting = self.worker.open.keys() != self.client._open.keys()
            assert self.client._on_trial or not is_anyone_waiting

    def teardown(self) -> None:
        try:
            self._serve_all()
        finally:
            for reader in self.readers:
                reader.task.cancel()
            self._settle()
            self.loop.close()
            self.no_end.stop()
            asyncio.set_event_loop(None)

    def _serve_all(self) -> None:
        # However it stands, and though a newcomer arrives with every step: in the end all are served.
        if self.worker is None:
            self.attach()
        assert self.worker is not None
        old = [reader for reader in self.readers if not reader.task.done()]
        for _ in range(4 * len(old) + 8):
            self.arrive()
            for key in [key for key in self.worker.open if self.worker.num_made[key] >= 2]:
                self._dispatch(self.worker, [key], last=True)
            self._dispatch(self.worker, sorted(self.worker.open), last=False)
        assert all(reader.task.done() for reader in old)
        while self.worker.open:
            self._dispatch(self.worker, sorted(self.worker.open), last=True)
        self.no_id_is_lost_or_doubled_and_each_request_ends_once()
        assert self.client.num_open == 0


WorkersComeAndGo.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestWorkersComeAndGo = WorkersComeAndGo.TestCase
