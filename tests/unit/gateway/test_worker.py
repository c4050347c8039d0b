"""What the gateway makes of a worker's messages, and of its end."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from functools import partial
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock, Mock

import psutil
import pytest

from parleyd.config import ModelSettings, ServerSettings
from parleyd.errors import Draining, StartupError, WorkerLost
from parleyd.gateway import worker_link
from parleyd.gateway.supervisor import State, Supervisor
from parleyd.gateway.worker import Worker
from parleyd.generation import EngineStats
from parleyd.ipc.messages import Start

_SCRIPT = """
import socket, sys
from parleyd.generation import EngineStats
from parleyd.ipc.framing import send_frame
from parleyd.ipc.messages import Progress, encode
ours = socket.socket(fileno=int(sys.argv[1]))
for num_waiting, progress in ((0, 0), (0, 1), (1, 1), (2, 1), (1, 2)):
    send_frame(ours, encode(Progress(EngineStats(num_waiting=num_waiting), progress)))
"""

# Fails to load.
_FAILING = """
import os, sys
from parleyd.worker.process import run
def load(settings):
    raise {error}
os._exit(run(int(sys.argv[1]), load))
"""

# Begins no thread beyond so many.
_SHORT_OF_THREADS = """
import os, sys, threading
from types import SimpleNamespace
from parleyd.worker.process import run
begin, num_left = threading.Thread.start, {num_threads}
def start(thread):
    global num_left
    if not num_left:
        raise RuntimeError("can't start new thread")
    num_left -= 1
    begin(thread)
threading.Thread.start = start
os._exit(run(int(sys.argv[1]), lambda settings: (SimpleNamespace(progress=0, stats=dict), None)))
"""

# Two processes that hold the socket.
_PAIR = "import os, time; os.fork(); time.sleep(60)"
# Closes its socket, and lives on.
_LINGERER = "import os, sys, time; os.close(int(sys.argv[1])); time.sleep(60)"
_TIMEOUT_S = 20.0


def start(script: str) -> Worker:
    return Worker(
        Start(ModelSettings(model="x")), command=(sys.executable, "-c", script), on_outputs=lambda outputs: None
    )


async def test_a_queue_that_grows_behind_a_hang_is_no_sign_of_life() -> None:
    worker = start(_SCRIPT)
    await worker.gone.wait()
    await worker.ended()
    assert worker.num_signs == 3
    assert worker.stats == EngineStats(num_waiting=1)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("MemoryError", "too little memory"),
        ("RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB.')", "too little memory"),
        ("ValueError('a number')", "it cannot be served: ValueError: a number (--log-level debug tells where)"),
    ],
)
async def test_a_model_that_cannot_be_served_is_told_with_the_reason(error: str, reason: str) -> None:
    worker = start(_FAILING.format(error=error))
    async with asyncio.timeout(_TIMEOUT_S):
        with pytest.raises(StartupError, match=re.escape(f"--model x: {reason}")):
            await worker.load()
        await worker.ended()


@pytest.mark.parametrize("num_threads", [0, 1])
async def test_a_worker_that_can_begin_no_threads_says_so(num_threads: int) -> None:
    worker = start(_SHORT_OF_THREADS.format(num_threads=num_threads))
    async with asyncio.timeout(_TIMEOUT_S):
        with pytest.raises(StartupError, match="--model x: it cannot be served: RuntimeError: can't start new thread"):
            await worker.load()
        await worker.ended()


@pytest.mark.parametrize("by_us", [False, True])
async def test_a_worker_that_the_kernel_may_have_killed_for_its_memory_is_told_of(
    by_us: bool, caplog: pytest.LogCaptureFixture
) -> None:
    worker = start(_LINGERER if by_us else "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    async with asyncio.timeout(_TIMEOUT_S):
        await worker.gone.wait()
        if by_us:
            assert worker.link
            worker.link.kill()
        await worker.ended()
    assert f"ended with exit code {-signal.SIGKILL}" in caplog.text
    assert ("memory" in caplog.text) is not by_us


async def test_a_worker_that_has_ended_can_be_killed_though_another_process_holds_its_socket() -> None:
    worker = start(_PAIR)
    async with asyncio.timeout(_TIMEOUT_S):
        while not (worker.link and (heirs := psutil.Process(worker.link.pid).children())):
            await asyncio.sleep(0.01)
        try:
            os.kill(worker.link.pid, signal.SIGKILL)
            while psutil.pid_exists(worker.link.pid):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert not worker.gone.is_set()
            worker.link.kill()
            await worker.gone.wait()
            await worker.ended()
        finally:
            heirs[0].kill()


@pytest.mark.parametrize("is_cut_short", [False, True])
async def test_a_worker_that_outlives_its_socket_is_ended(monkeypatch: pytest.MonkeyPatch, is_cut_short: bool) -> None:
    monkeypatch.setattr(worker_link, "_STOP_TIMEOUT_S", _TIMEOUT_S if is_cut_short else 0.2)
    worker = start(_LINGERER)
    async with asyncio.timeout(_TIMEOUT_S):
        await worker.gone.wait()
        assert worker.link is not None
        process = psutil.Process(worker.link.pid)
        stopping = asyncio.create_task(worker.stop())
        if is_cut_short:
            await asyncio.sleep(0.1)
            assert process.is_running()
            stopping.cancel()
        await asyncio.wait([stopping])
        # Until asyncio knows, too, a moment after its id is free: it would complain amid a later test.
        await worker.link._process.wait()


async def test_a_worker_that_cannot_be_started_tells_why_and_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", fail)
    worker = start(_LINGERER)
    async with asyncio.timeout(_TIMEOUT_S):
        with pytest.raises(StartupError, match="cannot be started: can't start new thread"):
            await worker.load()
        await worker.gone.wait()
        await worker.ended()


@pytest.mark.parametrize("num_turns", range(4))
async def test_who_is_cancelled_as_the_watched_worker_ends_is_cancelled(num_turns: int) -> None:
    client: Any = SimpleNamespace(num_open=0)
    settings, server = ModelSettings(model="x"), ServerSettings()
    supervisor = Supervisor(settings, server, client, on_ready=cast(Any, None), set_serving=cast(Any, None), command=())
    worker: Any = SimpleNamespace(gone=asyncio.Event(), num_signs=0, num_submitted=0, is_behind=False, link=None)
    watching = asyncio.create_task(supervisor._watch(worker))
    await asyncio.sleep(0.01)
    worker.gone.set()
    for _ in range(num_turns):
        await asyncio.sleep(0)
    is_cancelled = watching.cancel()  # else it had ended before
    await asyncio.wait([watching])
    assert watching.cancelled() == is_cancelled


async def test_who_waits_for_the_next_worker_is_refused_at_once() -> None:
    supervisor = Supervisor(
        ModelSettings(model="x"), ServerSettings(), cast(Any, None), on_ready=cast(Any, None),
        set_serving=cast(Any, None), command=(),
    )  # fmt: skip
    supervisor._enter(State.REPLACING)
    waiting = asyncio.create_task(supervisor.wait_ready())
    await asyncio.sleep(0)
    supervisor.refuse(Draining())
    async with asyncio.timeout(_TIMEOUT_S):
        with pytest.raises(Draining):
            await waiting


async def test_a_worker_that_dies_as_its_model_is_read_is_given_no_request() -> None:
    client, info = Mock(), cast(Any, "info")
    worker: Any = SimpleNamespace(gone=asyncio.Event(), load=AsyncMock(return_value=info), link=Mock())
    supervisor = Supervisor(
        ModelSettings(model="x"), ServerSettings(), client, on_ready=AsyncMock(side_effect=lambda _: worker.gone.set()),
        set_serving=cast(Any, None), command=(),
    )  # fmt: skip
    await supervisor._serve(worker)
    client.attach.assert_not_called()


async def test_stretches_without_a_sign_of_life_count_only_in_a_row() -> None:
    num_open = [*[1] * 7, 0, *[1] * 7]  # as the watchdog finds it, look by look
    worker: Any = SimpleNamespace(gone=asyncio.Event(), num_signs=0, num_submitted=0, is_behind=False, link=Mock())

    class Client:
        @property
        def num_open(self) -> int:
            if len(num_open) == 1:
                worker.gone.set()
            return num_open.pop(0)

    supervisor = Supervisor(
        ModelSettings(model="x"), ServerSettings(worker_timeout=0.1), cast(Any, Client()), on_ready=cast(Any, None),
        set_serving=cast(Any, None), command=(),
    )  # fmt: skip
    await supervisor._watch(worker)
    worker.link.kill.assert_not_called()


async def test_workers_that_cannot_be_started_for_hours_are_started_anew_in_longer_and_longer_steps_up_to_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    supervisor = Supervisor(
        ModelSettings(model="x"), ServerSettings(spare_worker=False), cast(Any, SimpleNamespace(fail_all=id)),
        on_ready=cast(Any, None), set_serving=id, command=(),
    )  # fmt: skip
    supervisor._enter(State.READY)
    steps: list[object] = []
    lost: Any = SimpleNamespace(link=None, ended=AsyncMock(side_effect=lambda: steps.append("ended")))
    for num_losses in (0, 1, 2_000):
        supervisor._losses = num_losses
        with monkeypatch.context() as watched:
            watched.setattr(asyncio, "sleep", AsyncMock(side_effect=steps.append))
            worker = await supervisor._replace(lost)
        await worker.stop()
    assert steps == ["ended", 0.25, "ended", 0.5, "ended", 32]  # what the lost one held is free by then


async def test_a_worker_is_not_to_blame_for_a_time_in_which_we_were_stopped_ourselves_as_it_loaded() -> None:
    supervisor = Supervisor(
        ModelSettings(model="x"), ServerSettings(worker_timeout=0.8), cast(Any, None), on_ready=cast(Any, None),
        set_serving=cast(Any, None), command=(),
    )  # fmt: skip
    supervisor._info = cast(Any, object())  # an earlier one has loaded
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    worker: Any = SimpleNamespace(load=lambda: asyncio.shield(ready), link=None)
    loop.call_later(0.1, time.sleep, 1.0)
    loop.call_later(0.3, ready.set_result, "info")
    assert await supervisor._load(worker) == "info"
    ready = loop.create_future()
    with pytest.raises(WorkerLost, match=r"not loaded the model in \d"):
        await supervisor._load(worker)


async def test_a_worker_may_take_as_long_to_load_as_the_slowest_before_it_and_longer() -> None:
    supervisor = Supervisor(
        ModelSettings(model="x"), ServerSettings(worker_timeout=0.1), cast(Any, None), on_ready=cast(Any, None),
        set_serving=cast(Any, None), command=(),
    )  # fmt: skip
    for seconds in (0.3, 0.0, 0.6):
        loading = asyncio.create_task(asyncio.sleep(seconds, "info"))
        worker: Any = SimpleNamespace(load=partial(asyncio.shield, loading), link=None)
        assert await supervisor._load(worker) == "info"
        supervisor._info = cast(Any, "info")
