"""A real gateway on a free port, in a thread with an event loop of its own, so that any test can call it."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import Counter
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from parley.v1 import chat_pb2_grpc
from parleyd.config import ModelSettings, SecuritySettings, ServerSettings, Settings
from parleyd.gateway.server import Gateway
from tests.support.tasks import other_tasks

T = TypeVar("T")

_TIMEOUT_S = 30.0


def scripted_settings(
    *, max_running: int = 1, max_queue: int = 8, security: SecuritySettings | None = None, **server: Any
) -> Settings:
    """Settings for tests: a free port, quick drains."""
    server = {"port": 0, "drain_delay": 0.0, "served_model_name": "scripted", "max_queue": max_queue, **server}
    return Settings(
        server=ServerSettings(**server),
        security=security or SecuritySettings(),
        model=ModelSettings(max_running=max_running),
    )


def scripted_command(folder: Path, *arguments: str) -> Sequence[str]:
    """The command of a scripted worker."""
    return (sys.executable, "-m", "tests.support.scripted_worker", "--folder", str(folder), *arguments)


class GatewayThread:
    """Runs from `with` to the end of its body; `error` is what ended it early, if anything did.

    `credentials` are those of `channel` and the stubs on it.
    """

    def __init__(
        self,
        settings: Settings,
        command: Sequence[str],
        *,
        wait_ready: bool = True,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._credentials = credentials
        self._settings = settings
        self._command = command
        self._wait_ready = wait_ready
        self._started = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="gateway")
        self.loop: asyncio.AbstractEventLoop
        self.gateway: Gateway
        self.target = ""
        self.admin: str | None = None
        self.error: Exception | None = None
        self._left: Counter[str] = Counter()

    def __enter__(self) -> GatewayThread:
        self.thread.start()
        assert self._started.wait(_TIMEOUT_S)
        self.channel = self.connect(self._credentials)
        self.stub = chat_pb2_grpc.ChatServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        if self._wait_ready:
            self.wait_health(health_pb2.HealthCheckResponse.SERVING)
        return self

    def __exit__(self, *exc: object) -> None:
        self.channel.close()
        self.stop()

    def connect(self, credentials: grpc.ChannelCredentials | None = None) -> grpc.Channel:
        """A connection of its own."""
        if credentials is None:
            return grpc.insecure_channel(self.target)
        # gRPC would share connections between channels that look alike.
        return grpc.secure_channel(self.target, credentials, [("grpc.use_local_subchannel_pool", 1)])

    def stop(self) -> None:
        """Shuts down and waits; no task may be left then."""
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.gateway.begin_shutdown)
            self.thread.join(_TIMEOUT_S)
        assert not self.thread.is_alive()
        assert not self._left, f"tasks outlived the gateway: {dict(self._left)}"

    def tasks(self) -> Counter[str]:
        """The tasks of the gateway's event loop, by the names of their coroutines."""
        return self.run(other_tasks())

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the gateway's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(_TIMEOUT_S)

    def wait_health(self, status: int) -> None:
        """Watches the health service until it says so."""
        watch = self.health.Watch(health_pb2.HealthCheckRequest(service=""), timeout=_TIMEOUT_S)
        for response in watch:
            if response.status == status:
                watch.cancel()
                return
        raise AssertionError("the watch ended")

    def wait_idle(self) -> None:
        """Waits until no call is open and no request is known to the worker client."""
        self.run(self._idle())

    async def _idle(self) -> None:
        gateway = self.gateway
        while gateway.doorkeeper.num_open or gateway.worker.num_open or gateway.admission.num_running:
            await asyncio.sleep(0.005)
        assert gateway.doorkeeper.num_places or not gateway.doorkeeper._num_bytes, "bytes of ended calls"

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.gateway = Gateway(self._settings, self._command)
        self.target = await self.gateway.start()
        self.admin = self.gateway.start_admin()
        self._started.set()
        try:
            await self.gateway.serve()
        except Exception as error:
            self.error = error
        self._left = await other_tasks()
