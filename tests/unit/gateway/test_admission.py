"""The queue: its bounds, its order, and slots that are never lost."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from parleyd.errors import Draining, QueueFull
from parleyd.gateway.admission import Admission
from parleyd.gateway.fair_queue import Ticket
from tests.support.slot_holders import Holder, new_admission, settle


async def test_waiting_requests_enter_by_priority_then_arrival() -> None:
    admission = new_admission(max_running=1, max_queue=10)
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
    admission = new_admission(max_running=1, max_queue=1)
    running, waiting = Holder(admission), Holder(admission)
    await settle()
    with pytest.raises(QueueFull) as raised:
        await Holder(admission).task
    assert raised.value.retry_after_s is not None and raised.value.retry_after_s > 0
    await running.release()
    await waiting.release()


async def test_waiting_requests_can_be_refused_together() -> None:
    admission = new_admission(max_running=1, max_queue=5)
    running, *waiting = (Holder(admission) for _ in range(4))
    await settle()
    waiting[0].task.cancel()  # in the same moment, as is the next
    admission.refuse_waiting(Draining())
    waiting[1].task.cancel()
    results = await asyncio.gather(*(holder.task for holder in waiting), return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError, asyncio.CancelledError, Draining]
    await running.release()
    assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_a_turn_that_comes_together_with_a_cancellation_is_passed_on() -> None:
    admission = new_admission(max_running=1, max_queue=5)
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
    admission = new_admission(max_running=3, max_queue=10)
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
    admission = new_admission(max_running=2, max_queue=10)
    running, several, later = Holder(admission), Holder(admission, 0, 2), Holder(admission)
    await settle()
    assert not later.entered.is_set()
    several.task.cancel()
    await settle()
    assert later.entered.is_set()
    await running.release()
    await later.release()


async def test_more_sequences_than_slots_take_all_slots_and_give_them_back_as_the_last_ones_end() -> None:
    admission = new_admission(max_running=2, max_queue=10)
    slots = await admission.acquire(Ticket(num_sequences=4))
    held = [admission.num_running]
    for _ in range(5):
        slots.leave()
        held.append(admission.num_running)
    assert held == [2, 2, 2, 1, 0, 0]


async def test_slots_that_a_new_worker_brings_go_at_once_to_those_that_wait_for_any() -> None:
    admission = new_admission(max_running=1, max_queue=10)
    running, *waiting = [Holder(admission) for _ in range(4)]
    await settle()
    admission.set_max_running(3)
    await settle()
    assert [holder.entered.is_set() for holder in waiting] == [True, True, False]
    admission.set_max_running(1)  # and those that are held beyond so many go to nobody
    for holder in (running, *waiting[:2]):
        assert not waiting[2].entered.is_set()
        await holder.release()
        await settle()
    assert waiting[2].entered.is_set()
    await waiting[2].release()


@pytest.mark.parametrize("seed", range(20))
async def test_no_slot_is_lost_whatever_is_cancelled(seed: int) -> None:
    chance = random.Random(seed)
    admission = new_admission(max_running=3, max_queue=8)
    holders: list[Holder] = []
    for _ in range(200):
        match chance.choice(["arrive", "arrive", "leave", "release", "cancel"]):
            case "arrive":
                client = chance.choice("ab")
                holders.append(Holder(admission, chance.randrange(3), chance.choice([1, 1, 2, 5]), client=client))
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


async def order_of(admission: Admission, running: Holder, waiting: list[Holder]) -> list[int]:
    """The order in which they get their turns, one at a time."""
    order: list[Holder] = []
    current = running
    while len(order) < len(waiting):
        await current.release()
        await settle()
        current = next(h for h in waiting if h.entered.is_set() and h not in order)
        order.append(current)
    await current.release()
    return [waiting.index(holder) for holder in order]


async def test_one_clients_thousand_requests_do_not_hold_up_anothers_one() -> None:
    admission = new_admission(max_running=1, max_queue=2000)
    running = Holder(admission, client="many")
    await settle()
    waiting = [Holder(admission, client="many") for _ in range(1000)]
    await settle()
    waiting += [Holder(admission, client="one"), Holder(admission, client="two")]
    await settle()
    order = await order_of(admission, running, waiting)
    assert {order.index(1000), order.index(1001)} <= {0, 1, 2}
    assert [i for i in order if i < 1000] == list(range(1000))


async def test_clients_share_by_slots_not_by_requests() -> None:
    admission = new_admission(max_running=4, max_queue=20)
    running = Holder(admission, 0, 4)
    await settle()
    wide = [Holder(admission, 0, 4, client="wide") for _ in range(2)]
    narrow = [Holder(admission, client="narrow") for _ in range(4)]
    await settle()
    await running.release()
    await wide[0].release()
    await settle()
    assert all(holder.entered.is_set() for holder in narrow) and not wide[1].entered.is_set()
    for holder in (*narrow, wide[1]):
        await holder.release()


async def test_the_place_of_the_greediest_goes_to_a_newcomer_when_the_queue_is_full() -> None:
    admission = new_admission(max_running=1, max_queue=4)
    running, *greedy = (Holder(admission, client="greedy") for _ in range(4))
    modest = Holder(admission, client="modest")
    await settle()
    one = Holder(admission, client="one")
    with pytest.raises(QueueFull):
        await greedy[2].task
    another = Holder(admission, client="one")
    with pytest.raises(QueueFull):
        await another.task
    assert await order_of(admission, running, [*greedy[:2], modest, one]) == [0, 2, 3, 1]
    assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_sooner_deadlines_go_first_and_priorities_before_deadlines() -> None:
    admission = new_admission(max_running=1, max_queue=10)
    running = Holder(admission)
    await settle()
    now = time.monotonic()
    waiting = [
        Holder(admission),
        Holder(admission, deadline=now + 50),
        Holder(admission, deadline=now + 20),
        Holder(admission, 1, deadline=now + 90),
        Holder(admission, deadline=now + 1000),
    ]
    await settle()
    assert await order_of(admission, running, waiting) == [3, 2, 1, 0, 4]


async def test_waiting_prompts_are_bounded_together() -> None:
    admission = new_admission(max_running=1, max_queue=10, max_queue_tokens=100)
    running = Holder(admission, num_tokens=1000)
    await settle()
    huge = Holder(admission, num_tokens=1000)  # alone, it may wait: else it could never be served
    await settle()
    with pytest.raises(QueueFull):
        await Holder(admission, num_tokens=1).task
    await running.release()
    await huge.release()


async def test_tokens_of_the_greediest_go_to_a_newcomer_when_they_fill_the_queue() -> None:
    admission = new_admission(max_running=1, max_queue=100, max_queue_tokens=100)
    running, *greedy = (Holder(admission, client="greedy", num_tokens=24) for _ in range(5))
    await settle()
    one = Holder(admission, client="one", num_tokens=40)
    for displaced in greedy[2:]:
        with pytest.raises(QueueFull):
            await displaced.task
    await settle()
    assert (admission.num_waiting, admission._queue.num_tokens) == (3, 88)
    for refused in (
        Holder(admission, client="one", num_tokens=20),
        Holder(admission, client="two", num_tokens=90),
    ):
        with pytest.raises(QueueFull):
            await refused.task
    assert admission.num_waiting == 3  # who has no right to enough displaces nobody
    assert await order_of(admission, running, [*greedy[:2], one]) == [0, 2, 1]
