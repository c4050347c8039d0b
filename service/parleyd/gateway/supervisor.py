"""Keeps one worker alive: starts it, passes its outputs on, replaces it when it dies, gives up in the end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum

from parleyd.config import ModelSettings
from parleyd.errors import NotReady, ParleyError, StartupError, WorkerLost
from parleyd.gateway.worker_client import WorkerClient
from parleyd.gateway.worker_link import WORKER_COMMAND, WorkerLink
from parleyd.generation import ModelInfo
from parleyd.ipc.messages import LoadFailed, Ready, Start, Step

_logger = logging.getLogger("parleyd.supervisor")

_FIRST_BACKOFF_S = 0.25
_MAX_BACKOFF_S = 30.0


class State(Enum):
    """Where the worker is. Requests wait while it is being replaced; they are refused while it loads or is lost."""

    LOADING = "loading"
    READY = "ready"
    REPLACING = "replacing"
    LOST = "lost"


class Supervisor:
    """Owns the worker process. `on_ready` runs each time a worker has loaded, before requests reach it."""

    def __init__(
        self,
        settings: ModelSettings,
        client: WorkerClient,
        *,
        max_restarts: int,
        log_level: str,
        on_ready: Callable[[ModelInfo], Awaitable[None]],
        on_lost: Callable[[], Awaitable[None]],
        command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self._settings = settings
        self._client = client
        self._max_restarts = max_restarts
        self._log_level = log_level
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._command = command
        self._state = State.LOADING
        self._changed = asyncio.Event()
        self._link: WorkerLink | None = None
        self._losses = 0
        self._refusal: ParleyError | None = None

    @property
    def state(self) -> State:
        return self._state

    @property
    def worker_pid(self) -> int | None:
        """The live worker's process id."""
        return self._link.pid if self._link else None

    async def link(self) -> WorkerLink:
        """The ready worker, waited for while a dead one is being replaced. Raises NotReady or WorkerLost."""
        while True:
            if self._refusal is not None:
                raise self._refusal
            if self._state is State.READY and self._link is not None:
                return self._link
            if self._state is State.LOADING:
                raise NotReady
            if self._state is State.LOST:
                raise WorkerLost("the worker process cannot be brought back")
            await self._changed.wait()

    def refuse(self, error: ParleyError) -> None:
        """Has `link` raise this from now on, also for those that wait in it."""
        self._refusal = error
        self._enter(self._state)

    async def run(self) -> None:
        """Runs workers until cancelled. Raises StartupError if the first one cannot load its model."""
        while True:
            try:
                await self._run_worker()
            except StartupError as error:
                if self._state is State.LOADING:
                    raise
                _logger.error("the worker cannot load its model again: %s", error)
            self._losses += 1
            if self._losses > self._max_restarts:
                await self._give_up()
            await asyncio.sleep(self._backoff_s())

    async def _run_worker(self) -> None:
        """One worker's life, from start to death."""
        link = await WorkerLink.start(self._command)
        self._link = link
        try:
            link.send(Start(self._settings, self._log_level))
            while (message := await link.receive()) is not None:
                match message:
                    case Ready(info):
                        await self._on_ready(info)
                        self._enter(State.READY)
                    case LoadFailed(text):
                        raise StartupError(text)
                    case Step(outputs):
                        self._losses = 0  # it works: whatever killed the ones before is over
                        self._client.dispatch(outputs)
        finally:
            self._link = None
            if self._state is State.READY:
                self._enter(State.REPLACING)
            self._client.fail_all(WorkerLost())
            code = await link.stop()
            _logger.log(
                logging.INFO if code == 0 else logging.ERROR, "worker %d ended with exit code %d", link.pid, code
            )

    async def _give_up(self) -> None:
        """Refuses requests from now on, and waits to be cancelled."""
        if self._state is State.LOADING:
            raise StartupError(f"the worker process died {self._losses} times while it loaded the model")
        _logger.error("%d workers lost one after the other: giving up", self._losses)
        self._enter(State.LOST)
        await self._on_lost()
        await asyncio.Event().wait()

    def _backoff_s(self) -> float:
        return float(min(_FIRST_BACKOFF_S * 2 ** (self._losses - 1), _MAX_BACKOFF_S))

    def _enter(self, state: State) -> None:
        self._state = state
        self._changed.set()
        self._changed = asyncio.Event()
