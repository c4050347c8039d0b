"""Cuts off clients that have stopped reading."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from parleyd.errors import SlowReader

Context = grpc.aio.ServicerContext[Any, Any]

_CHECKS_PER_TIMEOUT = 8


class ReaderWatch:
    """Writes messages, and ends the waiting for a client whose window stays full.

    One timer looks after all writes. A timeout for each, made anew for every token, takes a twelfth of the event loop.
    """

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s`: how long a write may take; up to an eighth longer, as it comes."""
        self._timeout_s = timeout_s
        self._started: dict[asyncio.Task[Any], float] = {}  # of writes in progress, by the handler that waits for them
        self._cut: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def write(self, context: Context, response: Any) -> None:
        """As `context.write`. Raises SlowReader."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._started[task] = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(self._timeout_s / _CHECKS_PER_TIMEOUT, self._check, loop)
        try:
            await context.write(response)
        except asyncio.CancelledError as error:
            # Someone else may have cancelled the task too: then it is cancelled.
            if task in self._cut and not task.uncancel():
                raise SlowReader(self._timeout_s) from error
            raise
        finally:
            del self._started[task]
            self._cut.discard(task)

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        for task, started in self._started.items():
            if loop.time() - started >= self._timeout_s and task not in self._cut:
                self._cut.add(task)
                task.cancel()
        if self._started:
            self._timer = loop.call_later(self._timeout_s / _CHECKS_PER_TIMEOUT, self._check, loop)
