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
    turn: asyncio.Future[None] = field(compare=False)


class Slot:
    """The right to generate, from `Admission.acquire` until released; releasing again does nothing."""

    def __init__(self, release: Callable[[float], None]) -> None:
        self._release = release
        self._started = time.monotonic()
        self._is_held = True

    def release(self) -> None:
        """Gives the slot to the next in the queue."""
        if self._is_held:
            self._is_held = False
            self._release(time.monotonic() - self._started)


class Admission:
    """At most `max_running` slots are held at once; at most `max_queue` requests wait for one."""

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

    async def acquire(self, priority: int = 0) -> Slot:
        """A slot, after waiting for it. Raises QueueFull at once if there is no room to wait."""
        await self._enter(priority)
        return Slot(self._leave)

    def refuse_waiting(self, error: ParleyError) -> None:
        """Ends every waiting request with an error."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.turn.done():
                waiter.turn.set_exception(error)

    async def _enter(self, priority: int) -> None:
        waiting = len(self._waiters)
        if self._running < self.max_running and not waiting:
            self._running += 1
            return
        if waiting >= self._max_queue:
            raise QueueFull(waiting, self._retry_after_s(waiting))
        waiter = _Waiter((-priority, next(self._arrivals)), asyncio.get_running_loop().create_future())
        heapq.heappush(self._waiters, waiter)
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                heapq.heapify(self._waiters)
            elif not waiter.turn.cancelled() and waiter.turn.exception() is None:
                self._release()  # the turn came in the same moment as the cancellation
            raise

    def _leave(self, duration_s: float) -> None:
        self._mean_duration_s += _DURATION_WEIGHT * (duration_s - self._mean_duration_s)
        self._release()

    def _release(self) -> None:
        self._running -= 1
        while self._waiters and self._running < self.max_running:
            waiter = heapq.heappop(self._waiters)
            if not waiter.turn.done():
                self._running += 1
                waiter.turn.set_result(None)

    def _retry_after_s(self, waiting: int) -> float:
        """When a place should be free, by the mean duration of recent requests."""
        expected_s = self._mean_duration_s * (waiting + 1) / self.max_running
        return min(max(expected_s, _MIN_RETRY_S), _MAX_RETRY_S)
