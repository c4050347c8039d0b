"""Keeps one worker alive: starts it, replaces it when it dies or hangs, gives up in the end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from enum import Enum

from parleyd.config import ModelSettings, ServerSettings
from parleyd.errors import NotReady, ParleyError, StartupError, WorkerLost
from parleyd.gateway.spare_worker import SpareWorker
from parleyd.gateway.worker import Worker
from parleyd.gateway.worker_client import WorkerClient
from parleyd.generation import EngineStats, ModelInfo, Output
from parleyd.ipc.messages import Start

_logger = logging.getLogger("parleyd.supervisor")

_FIRST_BACKOFF_S = 0.25
_MAX_BACKOFF_DOUBLINGS = 7
# The watchdog counts quiet stretches, not seconds on the clock: a gateway that was itself stopped blames nobody.
_NUM_WATCHES = 8
# A worker that takes so many times as long to load as the slowest before it hangs. The first may take what it needs.
_LOAD_SHARE = 5


class State(Enum):
    """Where the worker is. Requests wait while it is being replaced; they are refused while it loads or is lost."""

    LOADING = "loading"
    READY = "ready"
    REPLACING = "replacing"
    LOST = "lost"


class Supervisor:
    """Owns the worker process. `on_ready` runs before requests reach the first worker, or one with another model;
    `set_serving` is told whether there is one, or will soon be again."""

    def __init__(
        self,
        settings: ModelSettings,
        server: ServerSettings,
        client: WorkerClient,
        *,
        on_ready: Callable[[ModelInfo], Awaitable[None]],
        set_serving: Callable[[bool], None],
        command: Sequence[str],
    ) -> None:
        self._settings = settings
        self._server = server
        self._client = client
        self._on_ready = on_ready
        self._set_serving = set_serving
        self._command = command
        self._state = State.LOADING
        self._changed = asyncio.Event()
        self._worker: Worker | None = None
        self._spare = SpareWorker(self._start_worker, self._load) if server.spare_worker else None
        self._info: ModelInfo | None = None
        self._slowest_load_s = 0.0
        self._losses = 0  # workers lost since one last made a token
        self.num_restarts = 0
        self.has_given_up = False  # for good
        self._refusal: ParleyError | None = None

    @property
    def state(self) -> State:
        return self._state

    @property
    def worker_pid(self) -> int | None:
        """The live worker's process id."""
        return self._worker.link.pid if self._worker and self._worker.link else None

    @property
    def engine_stats(self) -> EngineStats:
        """What the live worker last told of its engine."""
        return self._worker.stats if self._worker and not self._worker.gone.is_set() else EngineStats()

    @property
    def spare_pid(self) -> int | None:
        """The process id of the spare worker, once it has loaded."""
        return self._spare.pid if self._spare else None

    async def wait_ready(self) -> None:
        """Returns once a worker is ready; waits while a dead one is being replaced. Raises NotReady or WorkerLost."""
        while True:
            if self._refusal is not None:
                raise self._refusal
            match self._state:
                case State.READY:
                    return
                case State.LOADING:
                    raise NotReady
                case State.LOST:
                    raise WorkerLost
            await self._changed.wait()

    def refuse(self, error: ParleyError) -> None:
        """Has `wait_ready` raise this from now on, also for those that wait in it."""
        self._refusal = error
        self._enter(self._state)

    async def run(self) -> None:
        """Runs workers until cancelled. Raises StartupError if the first one cannot load its model."""
        self._worker = self._start_worker()
        try:
            while True:
                await self._serve(self._worker)
                self._worker = await self._replace(self._worker)
        finally:
            self._client.fail_all(WorkerLost())
            if self._spare:
                await self._spare.stop()
            await self._worker.stop()

    async def _serve(self, worker: Worker) -> None:
        """Lets a worker load, generates with it, and returns when it is gone."""
        is_loaded = False
        try:
            info = await self._load(worker)
            is_loaded = True
            if info != self._info:
                await self._on_ready(info)
                self._info = info
        except (StartupError, WorkerLost) as error:
            if self._state is State.LOADING and isinstance(error, StartupError):
                raise
            _logger.error("%s", error)
            if is_loaded and worker.link is not None:
                worker.link.kill()  # it is well, but its model's files are not: the next may find others
            return
        if worker.gone.is_set() or worker.link is None:
            return
        self._client.attach(worker.link)
        self._enter(State.READY)
        self._set_serving(True)
        if self._spare:
            self._spare.start()
        await self._watch(worker)
        self._enter(State.REPLACING)
        if self._client.detach():
            self._losses = 0  # whatever killed the ones before is over

    async def _load(self, worker: Worker) -> ModelInfo:
        """Raises what `Worker.load` does, also WorkerLost where it hangs; its process is killed then."""
        started = time.monotonic()
        limit_s = max(self._server.worker_timeout, _LOAD_SHARE * self._slowest_load_s) if self._info else None
        for _ in range(_NUM_WATCHES):
            with suppress(TimeoutError):
                async with asyncio.timeout(limit_s and limit_s / _NUM_WATCHES):
                    info = await worker.load()
                    break
        else:
            if worker.link is not None:
                worker.link.kill()
            raise WorkerLost(f"a worker has not loaded the model in {limit_s:g} s")
        self._slowest_load_s = max(self._slowest_load_s, time.monotonic() - started)
        return info

    async def _watch(self, worker: Worker) -> None:
        """Returns when the worker is gone; kills it if it does nothing for too long while there is work.

        There is work while a request is open, and also when one has been submitted since the last sign of life, though
        its client gave it up: a worker that gets on gives one for each. So clients of little patience, between whose
        attempts nothing is open, do not keep it from being found out; an idle one, which gives none, is left alone.
        Nor is more submitted to one that does not take what it was sent: that is work too.
        """
        num_quiet, num_signs, num_submitted = 0, -1, 0
        while not worker.gone.is_set():
            # Not wait_for: where the worker ends as we are cancelled, that of Python 3.11 drops the cancellation.
            with suppress(TimeoutError):
                async with asyncio.timeout(self._server.worker_timeout / _NUM_WATCHES):
                    await worker.gone.wait()
            if worker.num_signs != num_signs:
                num_quiet, num_signs, num_submitted = 0, worker.num_signs, worker.num_submitted
            elif self._client.num_open or worker.is_behind or worker.num_submitted != num_submitted:
                num_quiet += 1
            else:
                num_quiet = 0
            if num_quiet == _NUM_WATCHES and worker.link is not None:
                _logger.error("worker %d did nothing for %g s", worker.link.pid, self._server.worker_timeout)
                worker.link.kill()

    async def _replace(self, lost: Worker) -> Worker:
        """The next worker, sooner or later; a spare one at once."""
        self._losses += 1
        self.num_restarts += 1
        if self._losses > self._server.max_worker_restarts:
            await self._give_up(lost)
        if self._spare and (spare := self._spare.take()):
            return spare
        await lost.ended()  # its memory is free by then
        await asyncio.sleep(_FIRST_BACKOFF_S * 2 ** min(self._losses - 1, _MAX_BACKOFF_DOUBLINGS))
        return self._start_worker()

    async def _give_up(self, lost: Worker) -> None:
        """Refuses requests, and waits to be cancelled; where no worker could even be started, only until one can: the
        files or threads that are short may be free again."""
        if self._state is State.LOADING:
            raise StartupError(f"the worker process died {self._losses} times while it loaded the model")
        _logger.error("%d workers lost one after the other: giving up", self._losses)
        self._enter(State.LOST)
        self._client.fail_all(WorkerLost())
        self._set_serving(False)
        if lost.link is not None:
            self.has_given_up = True
            await asyncio.Event().wait()

    def _start_worker(self) -> Worker:
        start = Start(self._settings, self._server.log_level, self._server.log_format)
        return Worker(start, command=self._command, on_outputs=self._take_outputs)

    def _take_outputs(self, outputs: list[Output]) -> None:
        if any(output.token_ids for output in outputs):  # failures alone are no sign that it can work
            self._losses = 0
        self._client.dispatch(outputs)

    def _enter(self, state: State) -> None:
        self._state = state
        self._changed.set()
        self._changed = asyncio.Event()
