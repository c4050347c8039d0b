"""Clients take turns at what they share: each does one thing there at a time."""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """One line for each client. Who is in none has the turn at once; the others wait outside, and hold up nobody."""

    def __init__(self) -> None:
        # Of each client that has the turn: who waits for it.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def take(self, client: str) -> None:
        """Waits for the client's turn, in the order of asking; `pass_on` must follow."""
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
                self.pass_on(client)
            raise

    def pass_on(self, client: str) -> None:
        """The client has finished what it had the turn for."""
        waiting = self._waiting[client]
        while waiting:
            turn = waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        del self._waiting[client]
