"""What the queue remembers of clients that have nothing in it, and how many it says are ahead."""

from __future__ import annotations

import random
import time

import pytest

from parleyd.gateway.fair_queue import FairQueue, Ticket

_NUM_CLIENTS = 5000


async def serve_strangers(queue: FairQueue) -> None:
    for number in range(_NUM_CLIENTS):
        queue.push(Ticket(client=f"stranger {number}"))
        queue.pop()


async def test_clients_that_come_once_are_forgotten() -> None:
    queue = FairQueue()
    await serve_strangers(queue)
    assert len(queue._clients) < _NUM_CLIENTS / 5
    assert len(queue) == queue.num_tokens == 0


async def test_what_the_greediest_has_had_is_not_forgotten_for_them() -> None:
    queue = FairQueue()
    queue.push(Ticket(client="greedy", num_sequences=16))
    queue.pop()
    await serve_strangers(queue)
    queue.push(Ticket(client="greedy"))
    modest = queue.push(Ticket(client="modest"))
    assert queue.pop() is modest


async def test_who_waits_is_not_forgotten() -> None:
    queue = FairQueue()
    patient = queue.push(Ticket(client="patient", priority=-1, num_tokens=7))
    await serve_strangers(queue)
    assert queue.pop() is patient
    assert len(queue) == queue.num_tokens == 0


@pytest.mark.parametrize("seed", range(50))
async def test_no_fewer_are_ahead_than_it_says(seed: int) -> None:
    numbers, queue = random.Random(seed), FairQueue()

    def ticket() -> Ticket:
        deadline = numbers.choice([None, time.monotonic() + numbers.random() * 100])
        return Ticket(
            client=numbers.choice("abc"),
            priority=numbers.choice([-1, 0, 0, 0, 1]),
            num_sequences=numbers.choice([1, 1, 1, 16]),
            deadline=deadline,
        )

    for _ in range(numbers.randrange(60)):
        if len(queue) and numbers.random() < 0.3:
            queue.pop()
        else:
            queue.push(ticket())
    last = ticket()
    num_ahead = queue.num_ahead(last)
    waiter = queue.push(last)
    assert [queue.pop() for _ in range(len(queue))].index(waiter) >= num_ahead


async def test_other_clients_of_the_same_priority_count_as_ahead_turn_by_turn() -> None:
    queue = FairQueue()
    for client in ("own", "own", "other", "other", "other"):
        queue.push(Ticket(client=client))
    queue.push(Ticket(client="lesser", priority=-1))
    assert queue.num_ahead(Ticket(client="own")) == 4
