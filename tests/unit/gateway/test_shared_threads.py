"""Clients that share threads: one's work does not hold up another's, and nothing of it stays behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from parleyd.gateway.shared_threads import SharedThreads
from parleyd.gateway.turns import Turns

_TIMEOUT_S = 10.0


class Work:
    """Work that lasts until `end` is set."""

    def __init__(self, threads: SharedThreads, client: str) -> None:
        self.begun, self.end = threading.Event(), threading.Event()
        self.task = asyncio.create_task(threads.run(client, self._work))

    def _work(self) -> str:
        self.begun.set()
        assert self.end.wait(_TIMEOUT_S)
        return "done"


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture
def threads(executor: ThreadPoolExecutor) -> SharedThreads:
    return SharedThreads(executor)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(_TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.001)


async def assert_runs(threads: SharedThreads, client: str) -> None:
    """The client has its turn, and gives it away."""
    for _ in range(2):
        assert await asyncio.wait_for(threads.run(client, lambda: 1), _TIMEOUT_S) == 1


async def test_a_clients_second_work_waits_for_its_first_and_another_clients_does_not(threads: SharedThreads) -> None:
    mine = [Work(threads, "mine") for _ in range(3)]
    await until(mine[0].begun.is_set)
    await assert_runs(threads, "other")
    assert not mine[1].begun.is_set()
    for work, following in zip(mine, [*mine[1:], None], strict=True):
        work.end.set()
        assert await work.task == "done"
        if following:
            await until(following.begun.is_set)
    await assert_runs(threads, "mine")


async def test_work_runs_in_its_clients_order(threads: SharedThreads) -> None:
    order: list[int] = []
    await asyncio.gather(*(threads.run("mine", lambda number=number: order.append(number)) for number in range(20)))
    assert order == list(range(20))


async def test_what_fails_tells_why_and_passes_the_turn_on(threads: SharedThreads) -> None:
    with pytest.raises(ZeroDivisionError):
        await threads.run("mine", lambda: 1 // 0)
    await assert_runs(threads, "mine")


async def test_cancelled_work_keeps_the_turn_until_its_thread_is_free(threads: SharedThreads) -> None:
    first, second = Work(threads, "mine"), Work(threads, "mine")
    await until(first.begun.is_set)
    first.task.cancel()
    await asyncio.wait([first.task])
    assert first.task.cancelled()
    await asyncio.sleep(0.02)
    assert not second.begun.is_set()
    first.end.set()
    await until(second.begun.is_set)
    second.end.set()
    assert await second.task == "done"


async def test_who_stops_waiting_is_passed_over(threads: SharedThreads) -> None:
    works = [Work(threads, "mine") for _ in range(4)]
    await until(works[0].begun.is_set)
    for work in works[1:3]:
        work.task.cancel()
    works[0].end.set()
    await until(works[3].begun.is_set)
    works[3].end.set()
    await works[3].task
    assert not any(work.begun.is_set() for work in works[1:3])
    await assert_runs(threads, "mine")


@pytest.mark.parametrize("before_it", [False, True])
async def test_who_is_cancelled_just_as_the_turn_comes_gives_it_away(
    threads: SharedThreads, monkeypatch: pytest.MonkeyPatch, before_it: bool
) -> None:
    first, second, third = (Work(threads, "mine") for _ in range(3))
    await until(first.begun.is_set)
    pass_on = Turns.pass_on

    def pass_on_and_cancel(turns: Turns, client: str) -> None:
        steps = [lambda: pass_on(turns, client), second.task.cancel]
        for step in reversed(steps) if before_it else steps:
            step()

    monkeypatch.setattr(Turns, "pass_on", pass_on_and_cancel)
    first.end.set()
    await until(third.begun.is_set)
    assert not second.begun.is_set()
    third.end.set()
    await third.task
    await assert_runs(threads, "mine")


async def test_work_that_is_cancelled_before_a_thread_is_free_never_runs(threads: SharedThreads) -> None:
    held = [Work(threads, name) for name in "ab"]
    await until(lambda: all(work.begun.is_set() for work in held))
    late, next_one = Work(threads, "mine"), Work(threads, "mine")
    await asyncio.sleep(0.01)
    late.task.cancel()
    await asyncio.wait([late.task])  # it is dropped by then
    for work in held:
        work.end.set()
    await until(next_one.begun.is_set)
    next_one.end.set()
    await next_one.task
    assert not late.begun.is_set()


async def test_after_a_shutdown_all_that_wait_are_told(executor: ThreadPoolExecutor, threads: SharedThreads) -> None:
    works = [Work(threads, "mine") for _ in range(3)]
    await until(works[0].begun.is_set)
    executor.shutdown(wait=False, cancel_futures=True)
    works[0].end.set()
    assert await works[0].task == "done"
    for work in works[1:]:
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(work.task, _TIMEOUT_S)
