"""A worker loaded ahead, so that the one that dies is replaced at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from parleyd.errors import StartupError, WorkerLost
from parleyd.gateway.worker import Worker

_logger = logging.getLogger("parleyd.supervisor")

_RETRY_S = 10.0


class SpareWorker:
    """At most one, kept alive from `start` until it is taken."""

    def __init__(self, start_worker: Callable[[], Worker], load: Callable[[Worker], Awaitable[object]]) -> None:
        """`load` waits until a worker is ready, and ends one that hangs. Raises StartupError or WorkerLost."""
        self._start_worker = start_worker
        self._load = load
        self._worker: Worker | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id, once it has loaded."""
        worker = self._worker
        return worker.link.pid if worker and worker.link and worker.ready.done() and not worker.gone.is_set() else None

    def start(self) -> None:
        """Begins to load one, unless there is one."""
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep())

    def take(self) -> Worker | None:
        """Hands it over, loaded or loading; None if there is none."""
        if self._keeper:
            self._keeper.cancel()
        worker, self._worker, self._keeper = self._worker, None, None
        return worker if worker and not worker.gone.is_set() else None

    async def stop(self) -> None:
        """Ends it."""
        if worker := self.take():
            await worker.stop()

    async def _keep(self) -> None:
        while True:
            self._worker = self._start_worker()
            try:
                await self._load(self._worker)
                _logger.info("a spare worker is ready")
            except (StartupError, WorkerLost) as error:
                _logger.error("the spare worker: %s", error)
            await self._worker.gone.wait()
            await asyncio.sleep(_RETRY_S)
