"""Clients take turns in threads that they share: each has one piece of work there at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from typing import TypeVar

_Result = TypeVar("_Result")


class Turns:
    """Hands work to an executor. A client's further work waits outside, in its order, and so holds up no other's."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        # Of each client that has the turn: its further work.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    def __len__(self) -> int:
        """How many clients have work here."""
        return len(self._waiting)

    async def run(self, client: str, work: Callable[[], _Result]) -> _Result:
        """What `work` returns or raises. Cancelling this drops work that has not begun.

        No thread can be interrupted: begun work keeps the client's turn until its end, or who cancels and asks again
        would have all threads.
        """
        await self._wait_turn(client)
        try:
            submitted = self._executor.submit(work)
        except BaseException:
            self._pass_on(client)
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

    async def _wait_turn(self, client: str) -> None:
        waiting = self._waiting.get(client)
        if waiting is None:
            self._waiting[client] = deque()
            return
        turn = asyncio.get_running_loop().create_future()
        waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it came at the same moment
                self._pass_on(client)
            with suppress(ValueError):
                waiting.remove(turn)
            raise

    def _end(self, client: str, done: asyncio.Future[_Result]) -> None:
        self._pass_on(client)
        if not done.cancelled():
            done.exception()  # of cancelled work nobody else asks for it, and asyncio would complain

    def _pass_on(self, client: str) -> None:
        waiting = self._waiting[client]
        while waiting:
            turn = waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        del self._waiting[client]
