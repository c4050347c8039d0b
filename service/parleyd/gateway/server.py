"""The gateway, assembled: gRPC server, chat service, health, reflection, and the worker behind them."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from parley.v1 import chat_pb2, chat_pb2_grpc
from parleyd.config import Settings
from parleyd.errors import Draining, StartupError
from parleyd.gateway.admission import Admission
from parleyd.gateway.chat import ChatService
from parleyd.gateway.doorkeeper import Doorkeeper
from parleyd.gateway.grammar_checker import GrammarChecker
from parleyd.gateway.health import Health
from parleyd.gateway.observer import Observer
from parleyd.gateway.options import server_options
from parleyd.gateway.prompt import PromptBuilder
from parleyd.gateway.reflection import add_reflection
from parleyd.gateway.runner import Runner
from parleyd.gateway.served_model import ServedModel
from parleyd.gateway.supervisor import Supervisor
from parleyd.gateway.worker_client import WorkerClient
from parleyd.gateway.worker_link import WORKER_COMMAND
from parleyd.generation import ModelInfo
from parleyd.rpc.connections import hang_up
from parleyd.rpc.first_message import FirstMessageInterceptor
from parleyd.rpc.interceptors import CallInterceptor
from parleyd.rpc.telemetry import TelemetryInterceptor
from parleyd.security.guard import Guard, check_address, check_admin_address
from parleyd.telemetry.admin import AdminServer
from parleyd.telemetry.metrics import Load
from parleyd.text.chat_template import template_utils

_logger = logging.getLogger("parleyd")

_DESCRIPTOR = chat_pb2.DESCRIPTOR.services_by_name["ChatService"]
_CHAT_SERVICE = _DESCRIPTOR.full_name
_RPCS = tuple(method.name for method in _DESCRIPTOR.methods)
# For the last calls to end, and then for their statuses to be written.
_STOP_GRACE_S = 1.0
_LAST_WRITES_S = 0.2
_MAX_OTHER_CALLS = 1024
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Gateway:
    """One replica. `start`, then `serve` until `begin_shutdown` is called or the service cannot go on."""

    def __init__(
        self,
        settings: Settings,
        worker_command: Sequence[str] = WORKER_COMMAND,
        on_serving: Callable[[], None] = lambda: None,
    ) -> None:
        server, model = settings.server, settings.model
        self._settings = settings
        self._on_serving = on_serving
        self._is_told_to_go = False
        self._shutdown = asyncio.Event()
        self._hurry = asyncio.Event()
        self._prompts = PromptBuilder()
        self._grammars = GrammarChecker()
        self.admission = Admission(
            model.max_running or 1,
            server.max_queue,
            max_queue_tokens=server.max_queue_tokens,
            refuse_late=server.refuse_late,
        )
        self.observer = Observer(self.load, server.otlp_endpoint)
        self.worker = WorkerClient(self.observer.metrics)
        self._admin: AdminServer | None = None
        self.health = Health()
        self.supervisor = Supervisor(
            model,
            server,
            self.worker,
            on_ready=self._on_worker_ready,
            set_serving=self.health.set_serving,
            command=worker_command,
        )
        self.doorkeeper = Doorkeeper(
            is_ready=lambda: self._chat.model is not None,
            # Beside those that run or wait: calls that are being checked, and answers that nobody reads.
            max_open=server.max_queue + (model.max_running or 0) + _MAX_OTHER_CALLS,
        )
        self.guard = Guard(settings.security, _RPCS)
        runner = Runner(self.admission, self.supervisor, self.worker, knows_clients=self.guard.is_on)
        self._chat = ChatService(
            self._prompts,
            self._grammars,
            runner,
            self.observer.item_ended,
            stream_interval=server.stream_interval,
        )
        check_address(server.host, settings.security)
        if server.admin_port is not None:
            check_admin_address(server.admin_host, settings.security)
        self._interceptor = self._build_interceptor()
        self._server = self._build_server()
        self._port = 0

    async def start(self) -> str:
        """Binds the port and starts answering. Returns HOST:PORT. Raises StartupError if the port cannot be bound."""
        bracketed, port = _bracketed(self._settings.server.host), self._settings.server.port
        credentials = self.guard.server_credentials()
        try:
            if credentials is None:
                bound = self._server.add_insecure_port(f"{bracketed}:{port}")
            else:
                bound = self._server.add_secure_port(f"{bracketed}:{port}", credentials)
        except RuntimeError as error:
            raise StartupError(
                f"cannot listen on {bracketed}:{port}: is the port in use, or the host not ours? "
                "--port and --host name others"
            ) from error
        await self._server.start()
        self._port = bound
        return f"{bracketed}:{bound}"

    async def abandon(self) -> None:
        """Takes `start` back, where `serve` will not follow."""
        await self._server.stop(None)

    def start_admin(self) -> str | None:
        """Opens the admin port, if one is asked for. Returns HOST:PORT. Raises StartupError if it cannot be bound."""
        server = self._settings.server
        if server.admin_port is None:
            return None
        self._admin = AdminServer(
            server.admin_host,
            server.admin_port,
            self.observer.metrics.registry,
            is_alive=lambda: not self.supervisor.has_given_up,
            is_serving=lambda: self.health.is_serving,
        )
        return f"{_bracketed(server.admin_host)}:{self._admin.port}"

    def load(self) -> Load:
        """The state now; may be asked from any thread."""
        return Load(
            model=self._settings.served_model_name,
            num_open_calls=self.doorkeeper.num_open,
            num_waiting=self.admission.num_waiting,
            num_running=self.admission.num_running,
            max_running=self.admission.max_running,
            is_serving=self.health.is_serving,
            num_worker_restarts=self.supervisor.num_restarts,
            num_handed_over=self.worker.num_handed_over,
            engine=self.supervisor.engine_stats,
        )

    def drain(self) -> None:
        """Asks `serve` to drain and return."""
        self._shutdown.set()

    def begin_shutdown(self) -> None:
        """Asks for it too; asked again, to end what is open at once."""
        if self._is_told_to_go:
            self._hurry.set()
            self._end_calls()
        self._is_told_to_go = True
        self.drain()

    async def serve(self) -> None:
        """Serves until asked to shut down, then drains. Raises StartupError if the model cannot be loaded."""
        supervision = asyncio.create_task(self.supervisor.run())
        shutdown = asyncio.create_task(self._shutdown.wait())
        freshness = asyncio.create_task(self.guard.keep_fresh())
        asyncio.get_running_loop().run_in_executor(None, _import_template_utils)  # while the model loads
        try:
            await asyncio.wait([supervision, shutdown], return_when=asyncio.FIRST_COMPLETED)
            if supervision.done():
                await supervision  # raises what ended it
            await self._drain()
        finally:
            shutdown.cancel()
            freshness.cancel()
            await asyncio.sleep(_LAST_WRITES_S)
            await self._hang_up()
            await self._server.stop(_STOP_GRACE_S)
            supervision.cancel()
            await asyncio.gather(supervision, return_exceptions=True)
            self._prompts.close()
            await self._grammars.close()
            self.observer.close()
            if self._admin:
                self._admin.close()

    async def _hang_up(self) -> None:
        try:
            await asyncio.to_thread(hang_up, self._port)
        except Exception as error:  # no file can be opened, no thread begun: what can still be ended must be
            _logger.warning("could not end the connections: calls that arrive now end with CANCELLED: %s", error)

    async def _drain(self) -> None:
        server = self._settings.server
        _logger.info("shutting down: %d calls open", self.doorkeeper.num_open)
        self.health.shut_down()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), server.drain_delay)
        self.doorkeeper.close()
        if not await self._emptied(server.drain_timeout):
            _logger.warning("ending %d calls that did not finish in time", self.doorkeeper.num_open)
            self._end_calls()
            if not await self.doorkeeper.wait_empty(_STOP_GRACE_S):
                # Their grammars are still being checked, or their prompts made.
                self._interceptor.end_calls(Draining())

    async def _emptied(self, timeout_s: float) -> bool:
        """Waits for open calls to end, until asked to hurry; False if some have not by then."""
        emptied = asyncio.create_task(self.doorkeeper.wait_empty(timeout_s))
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait([emptied, hurry], return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        emptied.cancel()
        return self.doorkeeper.num_open == 0

    def _end_calls(self) -> None:
        """Ends every open call that has come to the queue, or comes there, with DRAINING."""
        self.doorkeeper.close()
        self.admission.refuse_waiting(Draining())
        self.supervisor.refuse(Draining())
        self.worker.fail_all(Draining())

    async def _on_worker_ready(self, info: ModelInfo) -> None:
        name = self._settings.served_model_name
        self._chat.model = await asyncio.to_thread(ServedModel.load, info, self._settings)
        _warn_of_gaps(self._chat.model)
        wanted = self._settings.model.max_running or info.max_running
        if wanted > info.max_running:
            _logger.warning("engine %s runs %d at a time: --max-running is capped", info.engine, info.max_running)
        self.admission.set_max_running(min(wanted, info.max_running))
        self._on_serving()
        _logger.info("serving %s (%s, %s)", name, info.dtype, info.device)

    def _build_interceptor(self) -> CallInterceptor:
        return CallInterceptor(
            _CHAT_SERVICE,
            self.guard,
            self.doorkeeper.enter,
            self.doorkeeper.leave,
            self.observer.load_report,
            self.doorkeeper.unread,
            self._settings.server.slow_reader_timeout,
        )

    def _build_server(self) -> grpc.aio.Server:
        telemetry = TelemetryInterceptor(_CHAT_SERVICE, self.observer.call_ended)
        server = grpc.aio.server(
            interceptors=[FirstMessageInterceptor(), telemetry, self._interceptor],
            options=server_options(self._settings.server),
        )
        chat_pb2_grpc.add_ChatServiceServicer_to_server(self._chat, server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        reflection = self._settings.security.reflection
        if reflection or (reflection is None and not self.guard.is_on):
            add_reflection(server, [_CHAT_SERVICE, health.SERVICE_NAME])
        return server


def _import_template_utils() -> None:
    with suppress(Exception):  # such as too many open files: told where they are needed, if it lasts
        template_utils()


def _warn_of_gaps(model: ServedModel) -> None:
    if model.template.obstacle:
        _logger.warning("%s %s: every conversation will be refused as UNSUPPORTED", model.name, model.template.obstacle)
    if model.tokenizer.vocab_size > model.info.vocab_size:
        _logger.warning(
            "%s has embeddings for %d of the %d tokens of its tokenizer: prompts with others will be refused",
            model.name,
            model.info.vocab_size,
            model.tokenizer.vocab_size,
        )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


async def serve(
    settings: Settings, announce: Callable[[str], None], worker_command: Sequence[str] = WORKER_COMMAND
) -> None:
    """Runs a gateway until SIGTERM, SIGINT or SIGHUP; a second of the first two ends open calls. `announce` gets one
    line for stdout."""
    gateway = Gateway(settings, worker_command, _freeze)
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:  # before anyone can know that we are here
        loop.add_signal_handler(number, gateway.begin_shutdown)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else nohup has started us
        # A terminal that closes may say so twice, and a service manager beside its SIGTERM: that is no hurry.
        loop.add_signal_handler(signal.SIGHUP, gateway.drain)
    address = await gateway.start()
    try:
        admin = gateway.start_admin()
    except StartupError:
        await gateway.abandon()
        raise
    announce(f"listening on {address}")
    if admin:
        announce(f"admin on {admin}")
    try:
        await gateway.serve()
    finally:
        for number in (*_SIGNALS, signal.SIGHUP):  # one more, as we leave, must not make a failure of it
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)


def _freeze() -> None:
    """What is there when serving begins stays for good. Looking for garbage in it takes the event loop 50 ms a time."""
    gc.collect()
    gc.freeze()
    # Nor is much found in what belongs to open calls, 20 to 30 ms of 550: not looked at after every 7,000 new objects,
    # but after 7 million, a quarter of an hour under full load.
    gc.set_threshold(700, 10, 1000)
