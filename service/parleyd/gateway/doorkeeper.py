"""Which calls may begin and how many are open: none while the model loads or the server shuts down."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from parleyd.errors import Draining, NotReady, QueueFull

_RETRY_S = 1.0


class Doorkeeper:
    """Counts ChatService calls. `enter` refuses while the model loads (`is_ready`) and once `close` was called."""

    def __init__(self, is_ready: Callable[[], bool], max_open: int) -> None:
        self._max_open = max_open
        self._is_ready = is_ready
        self._is_closed = False
        self._num_open = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def num_open(self) -> int:
        return self._num_open

    def enter(self) -> None:
        """Raises Draining, NotReady or QueueFull."""
        if self._is_closed:
            raise Draining
        if not self._is_ready():
            raise NotReady
        if self._num_open >= self._max_open:
            raise QueueFull(self._num_open, _RETRY_S)
        self._num_open += 1
        self._empty.clear()

    def leave(self) -> None:
        self._num_open -= 1
        if self._num_open == 0:
            self._empty.set()

    def close(self) -> None:
        """Refuses calls from now on."""
        self._is_closed = True

    async def wait_empty(self, timeout_s: float) -> bool:
        """Waits for open calls to end; False if some have not by then."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        return self._empty.is_set()
