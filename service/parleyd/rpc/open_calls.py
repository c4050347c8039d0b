"""The tasks that serve calls, so that those that wait for something can be ended wherever they do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from parleyd.errors import ParleyError


class OpenCalls:
    """Knows each task from when it enters to when it leaves."""

    def __init__(self) -> None:
        self._ended_by: dict[asyncio.Task[Any], ParleyError | None] = {}

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Lasts as long as a call is served by the task that enters. Raises the error of `end`."""
        task = asyncio.current_task()
        assert task is not None
        self._ended_by[task] = None
        try:
            yield
        except asyncio.CancelledError as error:
            # Someone else may have cancelled the task too: then it is cancelled.
            if (ended_by := self._ended_by[task]) is not None and not task.uncancel():
                raise ended_by from error
            raise
        finally:
            del self._ended_by[task]

    def end(self, error: ParleyError) -> None:
        """Ends all that are open, at whatever they wait for."""
        for task, ended_by in self._ended_by.items():
            if ended_by is None:
                self._ended_by[task] = error
                task.cancel()
