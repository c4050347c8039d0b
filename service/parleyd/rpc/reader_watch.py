"""Cuts off clients that have stopped reading."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import grpc

from parleyd.errors import SlowReader

Context = grpc.aio.ServicerContext[Any, Any]

_CHECKS_PER_TIMEOUT = 8
# A client that reads on, if only so fast, is given the time that it takes for a long message.
_MIN_BYTES_PER_S = 16 * 1024


@dataclass
class _Write:
    """`response`: what it writes, as long as its length has not been counted into the deadline."""

    deadline: float
    response: Any | None


class ReaderWatch:
    """Writes messages, and ends the waiting for a client whose window stays full.

    One timer looks after all writes. A timeout for each, made anew for every token, takes a twelfth of the event loop.
    """

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s`: how long a write may take, beside what its length takes; up to an eighth longer, as it comes.
        A time in which this process was stopped does not count."""
        self._timeout_s = timeout_s
        self._interval_s = timeout_s / _CHECKS_PER_TIMEOUT
        self._writes: dict[asyncio.Task[Any], _Write] = {}  # by the handlers that wait for them
        self._cut: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def write(self, context: Context, response: Any) -> None:
        """As `context.write`. Raises SlowReader."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._writes[task] = _Write(loop.time() + self._timeout_s, response)
        if self._timer is None:
            self._check_later(loop)
        try:
            await context.write(response)
        except asyncio.CancelledError as error:
            # Someone else may have cancelled the task too: then it is cancelled.
            if task in self._cut and not task.uncancel():
                raise SlowReader(self._timeout_s) from error
            raise
        finally:
            del self._writes[task]
            self._cut.discard(task)

    def _check_later(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + self._interval_s
        self._timer = loop.call_at(due, self._check, loop, due)

    def _check(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        self._timer = None
        late_s = loop.time() - due
        for task, write in self._writes.items():
            if late_s > self._interval_s:  # we were stopped, and cannot tell who has read meanwhile
                write.deadline += late_s
            if loop.time() >= write.deadline and write.response is not None:
                # Only now: to tell its length, protobuf makes all of its bytes.
                write.deadline += write.response.ByteSize() / _MIN_BYTES_PER_S
                write.response = None
            if loop.time() >= write.deadline and task not in self._cut:
                self._cut.add(task)
                task.cancel()
        if self._writes:
            self._check_later(loop)
