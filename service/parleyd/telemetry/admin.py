"""The admin port: `/metrics` for Prometheus, `/healthz` and `/readyz` for those that cannot ask gRPC."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from parleyd.errors import StartupError

_REQUEST_TIMEOUT_S = 10.0
_MAX_CONNECTIONS = 64  # each has a thread


class AdminServer:
    """Plain HTTP in threads of its own, so that it answers whatever the event loop does."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry, is_serving: Callable[[], bool]) -> None:
        """Listens at once. Raises StartupError if the port cannot be bound."""
        self._metrics: Callable[..., Iterable[bytes]] = make_wsgi_app(registry)
        self._is_serving = is_serving
        try:
            self._server = make_server(host, port, self._answer, _Server, _Handler)
        except OSError as error:
            raise StartupError(f"the admin port cannot listen on {host}:{port}: {error.strerror}") from error
        self.port: int = self._server.server_port
        threading.Thread(target=self._server.serve_forever, name="admin", daemon=True).start()

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/metrics":
                return self._metrics(environ, start_response)
            case "/healthz":
                status = "200 OK"
            case "/readyz":
                status = "200 OK" if self._is_serving() else "503 Service Unavailable"
            case _:
                status = "404 Not Found"
        start_response(status, [("Content-Type", "text/plain")])
        return [status.encode() + b"\n"]


class _Server(ThreadingWSGIServer):
    """Closes what comes while too many connections are open, so that threads are bounded."""

    request_queue_size = 128  # where the default of 5 is full, the kernel has clients try again after seconds

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._free = threading.Semaphore(_MAX_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not worth a line each."""
