"""Who asks for slots, and holds them: for tests of the queue."""

from __future__ import annotations

import asyncio
from typing import Any

from parleyd.gateway.admission import Admission, Slots
from parleyd.gateway.fair_queue import Ticket


def new_admission(
    max_running: int, max_queue: int, max_queue_tokens: int = 1_000_000, *, refuse_late: bool = True
) -> Admission:
    return Admission(max_running, max_queue, max_queue_tokens=max_queue_tokens, refuse_late=refuse_late)


class Holder:
    """A task that holds slots until released."""

    def __init__(self, admission: Admission, priority: int = 0, num_sequences: int = 1, **ticket: Any) -> None:
        self.entered, self._release = asyncio.Event(), asyncio.Event()
        self.slots: Slots
        wanted = Ticket(priority=priority, num_sequences=num_sequences, **ticket)
        self.task = asyncio.create_task(self._hold(admission, wanted))

    async def _hold(self, admission: Admission, ticket: Ticket) -> None:
        self.slots = await admission.acquire(ticket)
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
