"""Requests and the workers that come and go beneath them, in any order: against a model that knows what should be."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, cast
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from parleyd.errors import EngineFault
from parleyd.gateway import worker_client
from parleyd.gateway.worker_client import WorkerClient
from parleyd.gateway.worker_link import WorkerLink
from parleyd.generation import EngineRequest, EngineStats, FinishReason, Output, SamplingParams
from parleyd.telemetry.call import Call, current_call
from parleyd.telemetry.metrics import Load, Metrics

_PARAMS = SamplingParams(max_new_tokens=100)


class Worker:
    """The other end of a link: what it was told to do. Its ids tell their positions, so that none is lost unseen."""

    def __init__(self) -> None:
        self.open: dict[int, int] = {}  # key: ids made so far, by any worker
        self.num_made: dict[int, int] = {}

    def submit(self, request: EngineRequest) -> None:
        assert request.key not in self.open
        self.open[request.key], self.num_made[request.key] = len(request.output_ids), 0
        assert request.output_ids == tuple(range(len(request.output_ids)))

    def abort(self, key: int) -> None:
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
    """Any order of arrivals, cancellations, steps, deaths, trials that end; in the end everyone is served."""

    def __init__(self) -> None:
        super().__init__()
        self.no_end = patch.object(worker_client, "_TRIAL_S", 1e6)  # but by the rule below
        self.no_end.start()
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self.client = WorkerClient(_METRICS)
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


class World:
    """A client, its readers, and a worker that dies when told to."""

    def __init__(self) -> None:
        self.client = WorkerClient(_METRICS)
        self.worker = Worker()
        self.readers: list[Reader] = []
        self.client.attach(cast(WorkerLink, self.worker))

    async def arrive(self) -> Reader:
        """Returns once it is on its way to the worker, or waits."""
        self.readers.append(reader := Reader(self.client))
        await asyncio.sleep(0)
        return reader

    def is_at_work(self, reader: Reader) -> bool:
        return reader.key in self.worker.open

    def serve(self, *readers: Reader) -> None:
        """Two tokens each."""
        for last in (False, True):
            self.client.dispatch([self.worker.make(reader.key, last=last) for reader in readers])

    def settle(self, reader: Reader) -> None:
        """Two tokens, and more to come."""
        for _ in range(2):
            self.client.dispatch([self.worker.make(reader.key, last=False)])

    async def die(self) -> None:
        self.client.detach()
        self.worker = Worker()
        self.client.attach(cast(WorkerLink, self.worker))
        await asyncio.sleep(0.01)  # for a reader to see its error


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(worker_client, "_TRIAL_S", 1e6)
    world = World()
    yield world
    for reader in world.readers:
        reader.task.cancel()
    await asyncio.gather(*(reader.task for reader in world.readers), return_exceptions=True)
    assert not world.client._open and not world.client._on_trial


async def test_a_suspect_that_makes_no_token_keeps_others_waiting_for_a_while_only(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = await world.arrive()
    await world.die()
    newcomers = [await world.arrive(), await world.arrive()]
    assert world.is_at_work(silent) and not any(map(world.is_at_work, newcomers))
    monkeypatch.setattr(worker_client, "_TRIAL_S", 0.0)
    world.client._set_on_trial(world.client._on_trial)  # anew, and this time it is over at once
    async with asyncio.timeout(10):
        while not all(map(world.is_at_work, newcomers)):
            await asyncio.sleep(0)
    assert world.is_at_work(await world.arrive())  # nor does the next one wait
    world.serve(*newcomers)
    await asyncio.wait([reader.task for reader in newcomers], timeout=10)
    assert all(reader.task.done() and reader.error is None for reader in newcomers)


async def test_a_suspect_that_has_settled_keeps_nobody_waiting_though_it_goes_on(world: World) -> None:
    suspect = await world.arrive()
    await world.die()
    newcomer = await world.arrive()
    assert not world.is_at_work(newcomer)
    world.settle(suspect)
    assert world.is_at_work(suspect) and world.is_at_work(newcomer)


async def test_what_has_settled_is_as_little_suspected_as_any_other(world: World) -> None:
    settled = await world.arrive()
    await world.die()
    world.settle(settled)
    await world.die()
    await world.arrive()
    for _ in range(2):
        await world.die()
    assert all(reader.error is None for reader in world.readers)


async def test_the_likeliest_suspect_is_tried_first(world: World) -> None:
    first, second = await world.arrive(), await world.arrive()
    for _ in range(2):
        await world.die()
        assert world.is_at_work(first) and not world.is_at_work(second)
    assert world.client.num_handed_over == 2 + 1  # at the second death, the other waited


async def test_a_new_worker_has_those_that_are_not_suspected_first(world: World) -> None:
    settled, suspect = await world.arrive(), await world.arrive()
    await world.die()
    await world.arrive()
    world.settle(settled)
    await world.die()
    assert world.is_at_work(settled) and not world.is_at_work(suspect)


async def test_nobody_waits_for_a_suspect_that_was_failed_with_all_others(world: World) -> None:
    await world.arrive()
    await world.die()
    world.client.fail_all(EngineFault("given up"))
    assert world.is_at_work(await world.arrive())


async def test_what_kills_late_is_to_blame_not_what_came_beside_it(world: World) -> None:
    late = await world.arrive()
    await world.die()
    world.client._end_trial()
    newcomer = await world.arrive()
    await world.die()
    assert late.error is not None
    assert world.is_at_work(newcomer) and newcomer.error is None


async def test_tokens_that_an_earlier_worker_made_clear_nobody_of_killing_the_next(world: World) -> None:
    poison = await world.arrive()
    for _ in range(3):
        world.client.dispatch([world.worker.make(poison.key, last=False)])
    for _ in range(3):
        await world.die()
        if poison.error is None:
            world.client.dispatch([world.worker.make(poison.key, last=False)])  # its prefill, but no decode
    assert poison.error is not None


async def test_what_kills_late_is_found_also_if_newcomers_keep_coming(world: World) -> None:
    late = await world.arrive()
    for _ in range(3):
        await world.arrive()
        await world.die()
        for _ in range(20):
            await world.arrive()
            if served := [reader for reader in world.readers if reader is not late and world.is_at_work(reader)]:
                world.serve(*served)
            elif world.client._on_trial:
                world.client._end_trial()
    assert late.error is not None
    assert all(reader.error is None for reader in world.readers if reader is not late)


async def test_what_kills_at_once_is_found_behind_one_that_makes_no_token(world: World) -> None:
    poison, silent = await world.arrive(), await world.arrive()
    for _ in range(4):
        await world.die()
        for _ in range(2):
            if world.client._on_trial and not world.is_at_work(poison):
                world.client._end_trial()
    assert poison.error is not None
    assert silent.error is None


async def test_what_hangs_the_worker_is_tried_after_those_that_it_held_up(world: World) -> None:
    hang, _ = await world.arrive(), await world.arrive()
    for _ in range(4):
        await world.die()
        for _ in range(4):
            working = [reader for reader in world.readers if world.is_at_work(reader)]
            if working and hang not in working:
                world.serve(*working)
            elif world.client._on_trial:
                world.client._end_trial()
        await world.arrive()  # and is held up
    assert hang.error is not None
    assert all(reader.error is None for reader in world.readers if reader is not hang)


@pytest.mark.parametrize("is_silent_first", [False, True])
@pytest.mark.parametrize("num_trials", [0.5, 1.5, 2.5, 5])
async def test_what_kills_after_any_time_is_found_beside_one_that_makes_no_token(
    world: World, num_trials: float, is_silent_first: bool
) -> None:
    first, second = await world.arrive(), await world.arrive()
    silent, poison = (first, second) if is_silent_first else (second, first)
    for _ in range(12):
        await world.die()
        if poison.error is not None:
            break
        left_s = num_trials * worker_client._TRIAL_S
        while world.client._on_trial:
            limit_s = worker_client._TRIAL_S * 2 ** min(e.num_outstayed for e in world.client._on_trial.values())
            if world.is_at_work(poison) and (left_s := left_s - limit_s) < 0:
                break
            world.client._end_trial()
    assert poison.error is not None and silent.error is None
