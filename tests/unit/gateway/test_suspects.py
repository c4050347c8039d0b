"""Who is tried, who waits and who is failed after a worker has died or hung."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import pytest

from parleyd.errors import EngineFault
from parleyd.gateway import worker_client
from parleyd.gateway.worker_client import WorkerClient
from parleyd.gateway.worker_link import WorkerLink
from tests.support.worker_readers import METRICS, Reader, Worker


class World:
    """A client, its readers, and a worker that dies when told to."""

    def __init__(self) -> None:
        self.client = WorkerClient(METRICS)
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


async def test_what_has_settled_after_its_trial_is_tried_as_soon_as_any_other(world: World) -> None:
    late = await world.arrive()
    await world.die()
    world.client._end_trial()
    world.settle(late)
    await world.die()
    other = await world.arrive()
    await world.die()
    assert world.is_at_work(late) and not world.is_at_work(other)


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


async def test_nobody_waits_for_a_suspect_that_was_given_up(world: World) -> None:
    suspect = await world.arrive()
    await world.die()
    newcomer = await world.arrive()
    assert not world.is_at_work(newcomer)
    suspect.task.cancel()
    await asyncio.wait([suspect.task])
    assert world.is_at_work(newcomer)


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
