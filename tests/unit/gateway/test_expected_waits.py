"""How long a request would wait, by how long others have: what would come too late is refused at once."""

from __future__ import annotations

import time

import pytest

from parleyd.errors import DeadlineExceeded
from parleyd.gateway.admission import Admission
from parleyd.gateway.fair_queue import Ticket
from tests.support.slot_holders import Holder, new_admission, settle


async def test_what_would_certainly_come_too_late_is_refused_at_once() -> None:
    admission = new_admission(max_running=1, max_queue=100)
    for _ in range(10):
        (await admission.acquire(Ticket())).release()  # so that it knows a mean duration: a fifth of a second
    running = Holder(admission)
    await settle()
    waiting = [Holder(admission, priority=1) for _ in range(50)]
    await settle()
    late = time.monotonic() + 1.0
    with pytest.raises(DeadlineExceeded):
        await Holder(admission, deadline=late).task
    hopeful = ({"deadline": late + 100}, {"deadline": late, "client": "other"}, {"deadline": late, "priority": 1})
    waiting += [Holder(admission, **ticket) for ticket in hopeful]
    await settle()
    assert admission.num_waiting == 53
    for holder in waiting:
        holder.task.cancel()
    await running.release()
    await settle()
    assert (admission.num_running, admission.num_waiting) == (0, 0)


@pytest.mark.parametrize("priority", [0, -1])
async def test_who_passes_its_clients_other_requests_is_not_too_late_for_them(
    priority: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    admission = await after_durations_of(1.0, monkeypatch)
    running = Holder(admission)
    waiting = [Holder(admission, priority=priority) for _ in range(50)]
    await settle()
    urgent = Holder(admission, deadline=time.monotonic() + 5.0)
    await settle()
    await running.release()
    await settle()
    assert urgent.entered.is_set()
    for holder in waiting:
        holder.task.cancel()
    await urgent.release()


async def after_durations_of(seconds: float, monkeypatch: pytest.MonkeyPatch, max_running: int = 1) -> Admission:
    """An admission whose requests have held their slots for so long each."""
    admission, now = new_admission(max_running=max_running, max_queue=100), time.monotonic()
    for _ in range(100):
        monkeypatch.setattr(time, "monotonic", lambda: now)
        slots = await admission.acquire(Ticket())
        monkeypatch.setattr(time, "monotonic", lambda: now + seconds)
        slots.release()
    monkeypatch.undo()
    return admission


@pytest.mark.parametrize(("max_running", "late_s", "hopeful_s"), [(1, 60.0, 160.0), (4, 10.0, 60.0)])
async def test_the_slot_that_comes_free_next_is_waited_for_too(
    max_running: int, late_s: float, hopeful_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    admission = await after_durations_of(200.0, monkeypatch, max_running)
    running = Holder(admission, num_sequences=max_running)
    await settle()
    with pytest.raises(DeadlineExceeded):
        await Holder(admission, deadline=time.monotonic() + late_s).task
    hopeful = Holder(admission, deadline=time.monotonic() + hopeful_s)
    await settle()
    assert admission.num_waiting == 1
    await running.release()
    await hopeful.release()


async def test_a_slot_that_is_free_for_one_ahead_in_the_queue_is_none_for_a_late_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    admission = await after_durations_of(60.0, monkeypatch, max_running=2)
    running, several = Holder(admission), Holder(admission, num_sequences=2)
    await settle()
    with pytest.raises(DeadlineExceeded):
        await Holder(admission, deadline=time.monotonic() + 10.0).task
    await running.release()
    await several.release()


async def test_what_would_come_too_late_is_served_all_the_same_where_the_operator_says_so() -> None:
    admission = new_admission(max_running=1, max_queue=0, refuse_late=False)
    for _ in range(10):
        admission.first_token(100, 60.0)
    (await admission.acquire(Ticket(num_tokens=100, deadline=time.monotonic() + 1.0))).release()


@pytest.mark.parametrize(("held_s", "retry_s"), [(1e-4, 0.1), (2.0, 4.0), (1e4, 60.0)])
async def test_a_full_queue_tells_the_time_that_those_in_it_take_within_bounds(
    held_s: float, retry_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    admission = await after_durations_of(held_s, monkeypatch)
    assert admission._queue_full(1).retry_after_s == pytest.approx(retry_s)


async def test_nothing_is_too_late_where_a_slot_is_free_or_little_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    known, fresh = await after_durations_of(60.0, monkeypatch), new_admission(max_running=1, max_queue=1)
    running = [Holder(known, deadline=time.monotonic() + 10.0), Holder(fresh)]
    await settle()
    assert all(holder.entered.is_set() for holder in running)
    waiting = Holder(fresh, deadline=time.monotonic() + 0.4)
    await settle()
    assert fresh.num_waiting == 1
    for holder in (*running, waiting):
        await holder.release()


async def test_where_slots_are_free_a_first_token_still_takes_its_time() -> None:
    admission = new_admission(max_running=4, max_queue=100)
    for _ in range(10):
        admission.first_token(100, 0.05)
        admission.first_token(1000, 2.0)
    with pytest.raises(DeadlineExceeded):
        await admission.acquire(Ticket(num_tokens=1000, deadline=time.monotonic() + 0.5))
    for ticket in (
        Ticket(num_tokens=100, deadline=time.monotonic() + 0.5),
        Ticket(num_tokens=1000, deadline=time.monotonic() + 1.5),
    ):
        (await admission.acquire(ticket)).release()
    admission.first_token(1000, 0.1)  # the machine, or the cache, can do better
    (await admission.acquire(Ticket(num_tokens=1000, deadline=time.monotonic() + 0.5))).release()
    for _ in range(30):
        admission.first_token(1000, 2.0)  # not any more
    with pytest.raises(DeadlineExceeded):
        await admission.acquire(Ticket(num_tokens=1000, deadline=time.monotonic() + 0.5))
    assert admission.num_running == 0


async def test_what_first_tokens_took_once_says_nothing_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    admission = new_admission(max_running=4, max_queue=100)
    for _ in range(10):
        admission.first_token(1000, 70.0)  # of many that came at once
    now = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await admission.acquire(Ticket(num_tokens=1000, deadline=now + 30.0))
    monkeypatch.setattr(time, "monotonic", lambda: now + 60.0)
    late = Ticket(num_tokens=1000, deadline=now + 90.0)
    (await admission.acquire(late)).release()
    admission.first_token(1000, 70.0)  # but it still does where it is seen again
    with pytest.raises(DeadlineExceeded):
        await admission.acquire(late)


async def test_requests_that_end_at_once_do_not_hide_those_that_hold_their_slots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    admission = await after_durations_of(0.01, monkeypatch, max_running=2)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    slots = await admission.acquire(Ticket(num_sequences=2))
    monkeypatch.setattr(time, "monotonic", lambda: now + 20)
    assert admission._queue_full(3).retry_after_s == pytest.approx(20 * 4 / 2)
    slots.release()
