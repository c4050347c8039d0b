"""Requests and the workers that come and go beneath them, in any order: against a model that knows what should be."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from parleyd.errors import EngineFault
from parleyd.gateway.worker_client import WorkerClient
from parleyd.gateway.worker_link import WorkerLink
from parleyd.generation import EngineRequest, EngineStats, FinishReason, Output, SamplingParams
from parleyd.ipc.messages import Abort, Submit
from parleyd.telemetry.call import Call, current_call
from parleyd.telemetry.metrics import Load, Metrics

_PARAMS = SamplingParams(max_new_tokens=100)


class Worker:
    """The other end of a link: what it was told to do. Its ids tell their positions, so that none is lost unseen."""

    def __init__(self) -> None:
        self.open: dict[int, int] = {}  # key: ids made so far, by any worker
        self.num_made: dict[int, int] = {}

    def send(self, message: object) -> None:
        match message:
            case Submit(request):
                assert request.key not in self.open
                self.open[request.key], self.num_made[request.key] = len(request.output_ids), 0
                assert request.output_ids == tuple(range(len(request.output_ids)))
            case Abort(key):
                self.open.pop(key, None)

    def make(self, key: int, *, last: bool) -> Output:
        position = self.open[key]
        self.open[key] += 1
        self.num_made[key] += 1
        if last:
            del self.open[key]
        return Output(key=key, token_ids=(position,), finish_reason=FinishReason.STOP if last else None)


class Reader:
    """Takes an answer to its end."""

    def __init__(self, client: WorkerClient) -> None:
        self.key = client.next_key()
        self.ids: list[int] = []
        self.num_ends = 0
        self.error: Exception | None = None
        self._client = client
        self.task = asyncio.get_event_loop().create_task(self._read())

    async def _read(self) -> None:
        current_call.set(Call("Generate", f"request-{self.key}"))
        request = EngineRequest(key=self.key, prompt_ids=(1,), params=_PARAMS)
        try:
            async for delta in self._client.generate(request, self._end):
                self.ids += delta.token_ids
        except EngineFault as error:
            self.error = error

    def _end(self) -> None:
        self.num_ends += 1


def _no_load() -> Load:
    return Load(
        model="", num_open_calls=0, num_waiting=0, num_running=0, max_running=1, is_serving=True,
        num_worker_restarts=0, num_handed_over=0, engine=EngineStats(),
    )  # fmt: skip


_METRICS = Metrics(_no_load)


class WorkersComeAndGo(RuleBasedStateMachine):
    """Any order of arrivals, cancellations, steps, deaths; in the end everyone is served."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self.client = WorkerClient(_METRICS)
        self.worker: Worker | None = None
        self.readers: list[Reader] = []
        self.expected: dict[int, int] = {}  # key: ids dispatched
        self.poisoned: set[int] = set()

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
        self.client.attach(cast(WorkerLink, self.worker))

    @precondition(lambda self: self.worker is not None)
    @rule()
    def die(self) -> None:
        assert self.worker is not None
        unsettled = {key for key in self.worker.open if self.worker.num_made[key] < 2}
        self.worker = None
        if self.client.detach():
            assert len(unsettled) == 1  # nobody is blamed while there is a doubt
            self.poisoned |= unsettled
        self._settle()

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
        self.client.dispatch([worker.make(key, last=last) for key in keys])
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
            suspects = self.client._suspects.keys() & self.worker.open.keys()
            assert not suspects or len(self.client._unsettled) == 1
            assert self.client._suspects or self.worker.open.keys() == self.client._open.keys()

    def teardown(self) -> None:
        try:
            self._serve_all()
        finally:
            for reader in self.readers:
                reader.task.cancel()
            self._settle()
            self.loop.close()
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


WorkersComeAndGo.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestWorkersComeAndGo = WorkersComeAndGo.TestCase
