"""The queue: its bounds, its order, and slots that are never lost."""

from __future__ import annotations

import asyncio
import random

import pytest

from parleyd.errors import Draining, QueueFull
from parleyd.gateway.admission import Admission, Slots


class Holder:
    """A task that holds slots until released."""

    def __init__(self, admission: Admission, priority: int = 0, num_sequences: int = 1) -> None:
        self.entered, self._release = asyncio.Event(), asyncio.Event()
        self.slots: Slots
        self.task = asyncio.create_task(self._hold(admission, priority, num_sequences))

    async def _hold(self, admission: Admission, priority: int, num_sequences: int) -> None:
        self.slots = await admission.acquire(priority, num_sequences)
        try:
            self.entered.set()
            await self._release.wait()
        finally:
            self.slots.release()
            self.slots.release()  # once too often does nothing

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


async def test_who_needs_several_slots_waits_for_them_and_is_passed_by_higher_ranks_alone() -> None:
    admission = Admission(max_running=3, max_queue=10)
    running = [Holder(admission) for _ in range(2)]
    await settle()
    several, later, urgent = Holder(admission, 0, 3), Holder(admission), Holder(admission, 1)
    await settle()
    assert [one.entered.is_set() for one in (several, later, urgent)] == [False, False, True]
    for holder in (*running, urgent):
        await holder.release()
        await settle()
    assert several.entered.is_set() and not later.entered.is_set()
    several.slots.leave()
    await settle()
    assert later.entered.is_set() and admission.num_running == 3
    for holder in (several, later):
        await holder.release()
    assert admission.num_running == 0


async def test_who_waits_for_more_slots_than_are_free_holds_up_nobody_once_cancelled() -> None:
    admission = Admission(max_running=2, max_queue=10)
    running, several, later = Holder(admission), Holder(admission, 0, 2), Holder(admission)
    await settle()
    assert not later.entered.is_set()
    several.task.cancel()
    await settle()
    assert later.entered.is_set()
    await running.release()
    await later.release()


async def test_more_sequences_than_slots_take_all_slots_and_give_them_back_as_the_last_ones_end() -> None:
    admission = Admission(max_running=2, max_queue=10)
    slots = await admission.acquire(0, 4)
    held = [admission.num_running]
    for _ in range(5):
        slots.leave()
        held.append(admission.num_running)
    assert held == [2, 2, 2, 1, 0, 0]


@pytest.mark.parametrize("seed", range(20))
async def test_no_slot_is_lost_whatever_is_cancelled(seed: int) -> None:
    chance = random.Random(seed)
    admission = Admission(max_running=3, max_queue=8)
    holders: list[Holder] = []
    for _ in range(200):
        match chance.choice(["arrive", "arrive", "leave", "release", "cancel"]):
            case "arrive":
                holders.append(Holder(admission, chance.randrange(3), chance.choice([1, 1, 2, 5])))
            case "leave" if holders and (entered := [one for one in holders if one.entered.is_set()]):
                chance.choice(entered).slots.leave()
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
