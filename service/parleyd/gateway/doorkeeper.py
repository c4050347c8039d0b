"""Which calls may begin and how many are open: none while the model loads or the server shuts down."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from parleyd.errors import Draining, NotReady, QueueFull

_RETRY_S = 1.0
# One client may have this many times as many calls open as there are places left: alone it gets eight ninths of them,
# beside others less, and who has none gets in as long as there is one.
_MAX_SHARE = 8
# The same holds for their requests, as they came over the wire: open calls keep them.
_MAX_BYTES = 256 * 2**20


class Doorkeeper:
    """Counts ChatService calls. `enter` refuses while the model loads (`is_ready`) and once `close` was called."""

    def __init__(self, is_ready: Callable[[], bool], max_open: int) -> None:
        self._max_open = max_open
        self._is_ready = is_ready
        self._is_closed = False
        self._num_entered = 0
        self._num_unread = 0
        self._num_bytes = 0
        self._by_client: Counter[str] = Counter()
        self._bytes_by_client: Counter[str] = Counter()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def num_open(self) -> int:
        """Those whose end is waited for."""
        return self._num_entered - self._num_unread

    @property
    def num_places(self) -> int:
        """How many are taken, by open calls and by answers that nobody reads."""
        return self._num_entered

    def enter(self, client: str = "", num_bytes: int = 0) -> None:
        """Raises Draining, NotReady or QueueFull; that one also where `client` has more than its share, of calls or of
        the bytes of their requests."""
        if self._is_closed:
            raise Draining
        if not self._is_ready():
            raise NotReady
        if self._by_client[client] >= _MAX_SHARE * (self._max_open - self.num_places):
            raise QueueFull(f"no room for more: {self._num_entered} calls are open already", _RETRY_S)
        if self._bytes_by_client[client] + num_bytes > _MAX_SHARE * (_MAX_BYTES - self._num_bytes - num_bytes):
            raise QueueFull("no room for so much: open calls' requests are large already", _RETRY_S)
        self._num_entered += 1
        self._num_bytes += num_bytes
        self._by_client[client] += 1
        self._bytes_by_client[client] += num_bytes
        self._empty.clear()

    def leave(self, client: str = "", num_bytes: int = 0) -> None:
        """One of the client's calls has ended."""
        self._num_entered -= 1
        self._num_bytes -= num_bytes
        self._by_client[client] -= 1
        self._bytes_by_client[client] -= num_bytes
        if not self._by_client[client]:
            del self._by_client[client], self._bytes_by_client[client]
        self._tell_if_empty()

    @contextmanager
    def unread(self) -> Iterator[None]:
        """While a call is over but for its last message, which gRPC keeps until the client reads it or goes away: the
        call still has its place, lest one client fill our memory with such, but nobody waits for its end."""
        self._num_unread += 1
        self._tell_if_empty()
        try:
            yield
        finally:
            self._num_unread -= 1

    def close(self) -> None:
        """Refuses calls from now on."""
        self._is_closed = True

    async def wait_empty(self, timeout_s: float) -> bool:
        """Waits for open calls to end; False if some have not by then."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        return self._empty.is_set()

    def _tell_if_empty(self) -> None:
        if self.num_open == 0:
            self._empty.set()
