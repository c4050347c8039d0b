"""Who may generate now, who waits, who is refused: a bounded queue in order of priority, then arrival."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from parleyd.errors import ParleyError, QueueFull

_MIN_RETRY_S = 0.1
_MAX_RETRY_S = 60.0
_DURATION_WEIGHT = 0.2


@dataclass(order=True)
class _Waiter:
    order: tuple[int, int]
    num_sequences: int = field(compare=False)
    turn: asyncio.Future[int] = field(compare=False)


class Slots:
    """A request's right to generate, from `Admission.acquire` until released: a slot for each of its sequences.

    One with more sequences than there are slots has all slots, and its sequences take turns in the worker.
    """

    def __init__(self, num_slots: int, num_sequences: int, release: Callable[[float], None]) -> None:
        self._num_held = num_slots
        self._num_sequences = num_sequences
        self._release = release
        self._started = time.monotonic()

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
            self._release(time.monotonic() - self._started)


class Admission:
    """At most `max_running` slots are held at once; at most `max_queue` requests wait for theirs.

    Nobody passes a waiting request of higher rank, not even where it needs more slots than are free: or it would wait
    for ever.
    """

    def __init__(self, max_running: int, max_queue: int) -> None:
        self.max_running = max_running
        self._max_queue = max_queue
        self._running = 0
        self._waiters: list[_Waiter] = []
        self._arrivals = itertools.count()
        self._mean_duration_s = 1.0

    @property
    def num_running(self) -> int:
        return self._running

    @property
    def num_waiting(self) -> int:
        return len(self._waiters)

    async def acquire(self, priority: int = 0, num_sequences: int = 1) -> Slots:
        """A slot for each sequence, after waiting for them. Raises QueueFull at once if there is no room to wait."""
        return Slots(await self._enter(priority, num_sequences), num_sequences, self._leave)

    def refuse_waiting(self, error: ParleyError) -> None:
        """Ends every waiting request with an error."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.turn.done():
                waiter.turn.set_exception(error)

    async def _enter(self, priority: int, num_sequences: int) -> int:
        """The number of slots taken."""
        waiting = len(self._waiters)
        num_slots = min(num_sequences, self.max_running)
        if self._running + num_slots <= self.max_running and not waiting:
            self._running += num_slots
            return num_slots
        if waiting >= self._max_queue:
            raise QueueFull(waiting, self._retry_after_s(waiting))
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        waiter = _Waiter((-priority, next(self._arrivals)), num_sequences, turn)
        heapq.heappush(self._waiters, waiter)
        self._admit()  # it may outrank one that waits for more slots than are free
        try:
            return await turn
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                heapq.heapify(self._waiters)
                self._admit()  # who stood behind it may need less
            elif not turn.cancelled() and turn.exception() is None:
                self._release(turn.result())  # the turn came in the same moment as the cancellation
            raise

    def _leave(self, duration_s: float) -> None:
        self._mean_duration_s += _DURATION_WEIGHT * (duration_s - self._mean_duration_s)
        self._release(1)

    def _release(self, num_slots: int) -> None:
        self._running -= num_slots
        self._admit()

    def _admit(self) -> None:
        while self._waiters:
            num_slots = min(self._waiters[0].num_sequences, self.max_running)
            if self._running + num_slots > self.max_running:
                return
            turn = heapq.heappop(self._waiters).turn
            if not turn.done():
                self._running += num_slots
                turn.set_result(num_slots)

    def _retry_after_s(self, waiting: int) -> float:
        """When a place should be free, by the mean duration of recent requests."""
        expected_s = self._mean_duration_s * (waiting + 1) / self.max_running
        return min(max(expected_s, _MIN_RETRY_S), _MAX_RETRY_S)
