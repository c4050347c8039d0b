"""One worker's life: started, loading, ready, gone."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress

from parleyd.errors import StartupError, WorkerLost
from parleyd.gateway.worker_link import WorkerLink
from parleyd.generation import EngineStats, ModelInfo, Output
from parleyd.ipc.messages import LoadFailed, Progress, Ready, Start, Step

_logger = logging.getLogger("parleyd.worker")


class Worker:
    """Begins to load what `start` names when made; `gone` is set once nothing more will come from it."""

    def __init__(
        self,
        start: Start,
        *,
        command: Sequence[str],
        on_outputs: Callable[[list[Output]], None],
    ) -> None:
        self.ready: asyncio.Future[ModelInfo] = asyncio.get_running_loop().create_future()
        self.gone = asyncio.Event()
        self.link: WorkerLink | None = None
        self.num_signs = 0  # of life: messages that only a worker sends that gets on
        self._progress = -1
        self.stats = EngineStats()
        self._start = start
        self._command = command
        self._on_outputs = on_outputs
        self._life = asyncio.create_task(self._live())

    @property
    def num_submitted(self) -> int:
        """Requests that it has been sent."""
        return self.link.num_submitted if self.link else 0

    @property
    def is_behind(self) -> bool:
        """Whether it has yet to take what it was sent."""
        return self.link is not None and self.link.is_behind

    async def load(self) -> ModelInfo:
        """Waits until it is ready. Raises StartupError if it cannot load, WorkerLost if it dies before."""
        return await asyncio.shield(self.ready)

    async def stop(self) -> None:
        """Ends the process and waits until it has ended."""
        if not self.gone.is_set():  # else it is about to end
            self._life.cancel()
        with suppress(asyncio.CancelledError):
            await self._life

    async def ended(self) -> None:
        """Waits until the process has ended."""
        await asyncio.shield(self._life)

    async def _live(self) -> None:
        try:
            link = self.link = await WorkerLink.start(self._command)
        except Exception as error:  # OSError, or RuntimeError where no thread can be had to watch it
            self.ready.set_exception(StartupError(f"the worker process cannot be started: {error}"))
            self.gone.set()
            return
        try:
            link.send(self._start)
            while (message := await link.receive()) is not None:
                self.num_signs += not isinstance(message, Progress) or message.progress != self._progress
                match message:
                    case Ready(info):
                        self.ready.set_result(info)
                    case LoadFailed(text):
                        self.ready.set_exception(StartupError(text))
                    case Step(outputs):
                        self._on_outputs(outputs)
                    case Progress(stats, progress):
                        self.stats, self._progress = stats, progress
        except Exception:  # such as bytes that are no message: nothing after them can be understood
            _logger.exception("worker %d cannot be understood", link.pid)
        finally:
            self.gone.set()
            if not self.ready.done():
                self.ready.set_exception(WorkerLost("the worker process died while it loaded the model"))
            self.ready.exception()  # seen, also where nobody waits for it
            code = await link.stop()
            level = logging.INFO if code == 0 else logging.ERROR
            cause = ""
            if code == -signal.SIGKILL and not link.is_killed:
                cause = ": it was killed, as by the kernel where memory runs out"
            _logger.log(level, "worker %d ended with exit code %d%s", link.pid, code, cause)
