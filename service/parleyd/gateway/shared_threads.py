"""Threads that clients share: each has one piece of work there at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

from parleyd.gateway.turns import Turns

_Result = TypeVar("_Result")


class SharedThreads:
    """Hands work to an executor. A client's further work waits outside, in its order, and so holds up no other's."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._turns = Turns()

    async def run(self, client: str, work: Callable[[], _Result]) -> _Result:
        """What `work` returns or raises. Cancelling this drops work that has not begun.

        No thread can be interrupted: begun work keeps the client's turn until its end, or who cancels and asks again
        would have all threads.
        """
        await self._turns.take(client)
        try:
            submitted = self._executor.submit(work)
        except BaseException:
            self._turns.pass_on(client)
            raise
        done = asyncio.wrap_future(submitted)
        done.add_done_callback(lambda done: self._end(client, done))
        try:
            # Unlike awaiting it, this does not cancel `done`, which is to end with the work.
            await asyncio.wait([done])
        except asyncio.CancelledError:
            submitted.cancel()
            raise
        return done.result()

    def _end(self, client: str, done: asyncio.Future[_Result]) -> None:
        self._turns.pass_on(client)
        if not done.cancelled():
            done.exception()  # of cancelled work nobody else asks for it, and asyncio would complain
