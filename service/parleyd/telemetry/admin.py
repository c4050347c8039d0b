"""The admin port: `/metrics` for Prometheus, `/healthz` and `/readyz` for those that cannot ask gRPC."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from parleyd.errors import StartupError

_logger = logging.getLogger("parleyd.admin")

_REQUEST_TIMEOUT_S = 10.0
_MAX_CONNECTIONS = 64  # each has a thread
_MAKE_ROOM_S = 1.0
_RETRY_S = 0.1


class AdminServer:
    """Plain HTTP in threads of its own, so that it answers whatever the event loop does."""

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        is_alive: Callable[[], bool],
        is_serving: Callable[[], bool],
    ) -> None:
        """Listens at once. Raises StartupError if the port cannot be bound."""
        self._metrics: Callable[..., Iterable[bytes]] = make_wsgi_app(registry)
        self._is_alive = is_alive
        self._is_serving = is_serving
        try:
            self._server = make_server(host, port, self._answer, _Server, _Handler)
        except OSError as error:
            raise StartupError(f"--admin-port {port}: cannot listen on {host}:{port}: {error.strerror}") from error
        self.port: int = self._server.server_port
        threading.Thread(target=self._server.serve_forever, name="admin", daemon=True).start()

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/metrics":
                try:
                    return self._metrics(environ, start_response)
                except Exception as error:  # some headers are too much for the library
                    _logger.warning("/metrics failed: %r", error)
                    status = "500 Internal Server Error"
            case "/healthz":
                status = "200 OK" if self._is_alive() else "503 Service Unavailable"
            case "/readyz":
                status = "200 OK" if self._is_serving() else "503 Service Unavailable"
            case _:
                status = "404 Not Found"
        start_response(status, [("Content-Type", "text/plain")])
        return [status.encode() + b"\n"]


class _Server(ThreadingWSGIServer):
    """Ends connections after a while, however busy they look, and the oldest where too many are open: those that are
    held open keep no probe out, and threads are bounded."""

    request_queue_size = 128  # where the default of 5 is full, the kernel has clients try again after seconds

    def __init__(self, address: tuple[str, int], *args: Any, **kwargs: Any) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, *args, **kwargs)
        self._free = threading.Semaphore(_MAX_CONNECTIONS)
        self._open: dict[socket.socket, float] = {}  # since when, the oldest first

    def get_request(self) -> Any:
        """A connection that no file is left for stays there, and wakes us again and again."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(_RETRY_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            for oldest in list(self._open)[:1]:
                _end(oldest)
            if not self._free.acquire(timeout=_MAKE_ROOM_S):
                self.shutdown_request(request)
                return
        self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """However a connection ends, also where no thread could be had for it."""
        try:
            super().shutdown_request(request)
        finally:
            if self._open.pop(request, None) is not None:
                self._free.release()

    def service_actions(self) -> None:
        """Called twice a second."""
        for request, since in list(self._open.items()):
            if time.monotonic() - since > _REQUEST_TIMEOUT_S:
                _end(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is nothing to report, and what it sent must not stand in the log."""
        _logger.debug("an admin connection broke", exc_info=True)


def _end(connection: socket.socket) -> None:
    """Wakes the thread that reads from it or writes to it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not worth a line each."""
