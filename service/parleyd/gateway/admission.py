"""Who may generate now, who waits, who is refused: slots, and a bounded queue before them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from parleyd.errors import DeadlineExceeded, ParleyError, QueueFull
from parleyd.gateway.fair_queue import FairQueue, Ticket, Waiter
from parleyd.gateway.first_tokens import FirstTokenTimes

_MIN_RETRY_S = 0.1
_MAX_RETRY_S = 60.0
_DURATION_WEIGHT = 0.2
# Requests are refused as too late only where even this share of the expected wait is too long: means are no promises.
_CERTAIN_SHARE = 0.5
_MIN_SAMPLES = 8


class Slots:
    """A request's right to generate, from `Admission.acquire` until released: a slot for each of its sequences.

    One with more sequences than there are slots has all slots, and its sequences take turns in the worker.
    """

    def __init__(self, num_slots: int, num_sequences: int, release: Callable[[float], None]) -> None:
        """`release` is called for each slot that is given up, with when it was given out."""
        self.since = time.monotonic()
        self._num_held = num_slots
        self._num_sequences = num_sequences
        self._release = release

    def leave(self) -> None:
        """One sequence has ended; a slot that none of the others needs goes to the next in the queue."""
        self._num_sequences -= 1
        self._release_down_to(max(self._num_sequences, 0))

    def release(self) -> None:
        """Gives up what is still held."""
        self._release_down_to(0)

    def _release_down_to(self, num_slots: int) -> None:
        while self._num_held > num_slots:
            self._num_held -= 1
            self._release(self.since)


class Admission:
    """At most `max_running` slots are held at once; at most `max_queue` requests wait, `max_queue_tokens` together.

    Nobody passes a waiting request of higher rank, not even where it needs more slots than are free: or it would wait
    for ever.
    """

    def __init__(self, max_running: int, max_queue: int, *, max_queue_tokens: int, refuse_late: bool) -> None:
        """`refuse_late`: whether to refuse at once what cannot begin before its deadline."""
        self._max_running = max_running
        self._max_queue = max_queue
        self._max_queue_tokens = max_queue_tokens
        self._refuse_late = refuse_late
        self._running = 0
        self._queue = FairQueue()
        self._first_tokens = FirstTokenTimes()
        self._mean_duration_s = 1.0
        self._num_durations = 0
        # Of the slots that are held, how many, and the sum of the times when they were given out.
        self._num_held = 0
        self._since_sum = 0.0

    @property
    def max_running(self) -> int:
        return self._max_running

    @property
    def num_running(self) -> int:
        return self._running

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    async def acquire(self, ticket: Ticket) -> Slots:
        """A slot for each sequence, after waiting for them.

        Raises QueueFull if there is no room to wait, at once or when the room goes to a client that has less of it;
        DeadlineExceeded at once if the first token would certainly come too late.
        """
        self._check_deadline(ticket)
        num_slots = min(ticket.num_sequences, self._max_running)
        if self._running + num_slots <= self._max_running and not self._queue:
            self._running += num_slots
        else:
            num_slots = await self._wait(ticket)
        slots = Slots(num_slots, ticket.num_sequences, self._leave)
        self._num_held += num_slots
        self._since_sum += num_slots * slots.since
        return slots

    def set_max_running(self, max_running: int) -> None:
        """Another number of slots: more go to those that wait; of fewer, those that are held stay so."""
        self._max_running = max_running
        self._admit()

    def first_token(self, num_tokens: int, seconds: float) -> None:
        """Takes how long a first token has taken from when its request had its slots."""
        self._first_tokens.observe(num_tokens, seconds)

    def refuse_waiting(self, error: ParleyError) -> None:
        """Ends every waiting request with an error."""
        for waiter in self._queue.clear():
            _refuse(waiter, error)

    async def _wait(self, ticket: Ticket) -> int:
        """The number of slots taken."""
        self._make_room(ticket)
        waiter = self._queue.push(ticket)
        self._admit()  # it may outrank one that waits for more slots than are free
        try:
            return await waiter.turn
        except asyncio.CancelledError:
            if self._queue.remove(waiter):
                self._admit()  # who stood behind it may need less
            elif not waiter.turn.cancelled() and waiter.turn.exception() is None:
                self._release(waiter.turn.result())  # the turn came in the same moment as the cancellation
            raise

    def _check_deadline(self, ticket: Ticket) -> None:
        if not self._refuse_late or ticket.deadline is None:
            return
        expected_s = self._expected_wait_s(ticket) + self._first_tokens.at_best(ticket.num_tokens)
        if time.monotonic() + _CERTAIN_SHARE * expected_s > ticket.deadline:
            raise DeadlineExceeded("the deadline would pass before this request's first token")

    def _expected_wait_s(self, ticket: Ticket) -> float:
        if self._num_durations < _MIN_SAMPLES or (self._running < self._max_running and not self._queue):
            return 0.0
        num_ahead = self._queue.num_ahead(ticket)
        until_next_s = self._duration_s() - self._age_s()
        return (self._duration_s() * num_ahead + until_next_s) / self._max_running

    def _duration_s(self) -> float:
        """For how long a slot is held: by recent requests, or by those that hold theirs now, if that is longer."""
        return max(self._mean_duration_s, self._age_s())

    def _age_s(self) -> float:
        """For how long the slots that are held have been so, on average."""
        return time.monotonic() - self._since_sum / self._num_held if self._num_held else 0.0

    def _make_room(self, ticket: Ticket) -> None:
        """Raises QueueFull unless there is room to wait, or a client has more than its share of places or tokens."""
        num_waiting = len(self._queue)
        has_room = num_waiting < self._max_queue
        if has_room and self._queue.num_tokens + ticket.num_tokens <= self._max_queue_tokens:
            return
        displaced = self._queue.to_displace(ticket, self._max_queue, self._max_queue_tokens)
        if displaced is None:
            raise self._queue_full(num_waiting)
        for waiter in displaced:
            self._queue.remove(waiter)
            _refuse(waiter, self._queue_full(num_waiting))

    def _leave(self, since: float) -> None:
        self._num_held -= 1
        self._since_sum -= since
        duration_s = time.monotonic() - since
        self._mean_duration_s += _DURATION_WEIGHT * (duration_s - self._mean_duration_s)
        self._num_durations += 1
        self._release(1)

    def _release(self, num_slots: int) -> None:
        self._running -= num_slots
        self._admit()

    def _admit(self) -> None:
        while self._queue:
            num_slots = min(self._queue.first().ticket.num_sequences, self._max_running)
            if self._running + num_slots > self._max_running:
                return
            turn = self._queue.pop().turn
            if not turn.done():
                self._running += num_slots
                turn.set_result(num_slots)

    def _queue_full(self, num_waiting: int) -> QueueFull:
        """With the time after which a place should be free, by how long recent requests held their slots."""
        expected_s = self._duration_s() * (num_waiting + 1) / self._max_running
        what = f"no room for more (running: {self._running}, waiting: {num_waiting})"
        return QueueFull(what, min(max(expected_s, _MIN_RETRY_S), _MAX_RETRY_S))


def _refuse(waiter: Waiter, error: ParleyError) -> None:
    if not waiter.turn.done():
        waiter.turn.set_exception(error)
