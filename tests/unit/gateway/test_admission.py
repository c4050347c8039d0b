"""The queue: its bounds, its order, and slots that are never lost."""

from __future__ import annotations

import asyncio
import random

import pytest

from parleyd.errors import Draining, QueueFull
from parleyd.gateway.admission import Admission


class Holder:
    """A task that holds a slot until released."""

    def __init__(self, admission: Admission, priority: int = 0) -> None:
        self.entered, self._release = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self._hold(admission, priority))

    async def _hold(self, admission: Admission, priority: int) -> None:
        slot = await admission.acquire(priority)
        try:
            self.entered.set()
            await self._release.wait()
        finally:
            slot.release()
            slot.release()  # once too often does nothing

    async def release(self) -> None:
        self._release.set()
        await self.task


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_waiting_requests_enter_by_priority_then_arrival() -> None:
    admission = Admission(max_running=1, max_queue=10)
    running = Holder(admission)
    await settle()
    waiting = []
    for priority in (0, 5, 0, 5, -1):
        waiting.append(Holder(admission, priority))
        await settle()
    order = []
    current = running
    for _ in waiting:
        await current.release()
        await settle()
        current = next(h for h in waiting if h.entered.is_set() and h not in order)
        order.append(current)
    await current.release()
    assert [waiting.index(holder) for holder in order] == [1, 3, 0, 2, 4]
    assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_a_full_queue_refuses_with_a_delay() -> None:
    admission = Admission(max_running=1, max_queue=1)
    running, waiting = Holder(admission), Holder(admission)
    await settle()
    with pytest.raises(QueueFull) as raised:
        await Holder(admission).task
    assert raised.value.retry_after_s is not None and raised.value.retry_after_s > 0
    await running.release()
    await waiting.release()


async def test_waiting_requests_can_be_refused_together() -> None:
    admission = Admission(max_running=1, max_queue=5)
    running, *waiting = (Holder(admission) for _ in range(4))
    await settle()
    admission.refuse_waiting(Draining())
    results = await asyncio.gather(*(holder.task for holder in waiting), return_exceptions=True)
    assert [type(result) for result in results] == [Draining] * 3
    await running.release()
    assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_a_turn_that_comes_together_with_a_cancellation_is_passed_on() -> None:
    admission = Admission(max_running=1, max_queue=5)
    running, cancelled, last = (Holder(admission) for _ in range(3))
    await settle()
    running._release.set()
    await asyncio.sleep(0)  # the slot is released in this pass of the loop: the turn is set, not yet taken
    cancelled.task.cancel()
    await settle()
    assert last.entered.is_set()
    await last.release()
    assert admission.num_running == 0


@pytest.mark.parametrize("seed", range(20))
async def test_no_slot_is_lost_whatever_is_cancelled(seed: int) -> None:
    chance = random.Random(seed)
    admission = Admission(max_running=3, max_queue=8)
    holders: list[Holder] = []
    for _ in range(200):
        match chance.choice(["arrive", "arrive", "release", "cancel"]):
            case "arrive":
                holders.append(Holder(admission, chance.randrange(3)))
            case "release" if holders:
                chance.choice(holders)._release.set()
            case "cancel" if holders:
                chance.choice(holders).task.cancel()
        for _ in range(chance.randrange(3)):
            await asyncio.sleep(0)
        assert admission.num_running <= 3 and admission.num_waiting <= 8
    for holder in holders:
        holder._release.set()
    await asyncio.gather(*(holder.task for holder in holders), return_exceptions=True)
    assert (admission.num_running, admission.num_waiting) == (0, 0)
