"""Logs: one line an event on stderr, with the request id where there is one. Never prompts, answers or secrets."""

from __future__ import annotations

import logging
import os
import queue
import select
import sys
import threading
from contextlib import suppress

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from parleyd.telemetry.call import current_call

_TEXT_FORMAT = "%(asctime)s %(levelname)-7s %(name)s%(request)s %(message)s"
_JSON_FORMAT = "%(asctime)s %(levelname)s %(name)s %(request_id)s %(identity)s %(message)s"
_MAX_WAITING = 4096
_FLUSH_TIMEOUT_S = 1.0

_logger = logging.getLogger("parleyd.log")


class _RequestFilter(logging.Filter):
    """Adds the current call's request id and caller to each record."""

    def filter(self, record: logging.LogRecord) -> bool:
        call = current_call.get(None)
        record.request_id = call.request_id if call else None
        record.identity = call.identity if call else None
        record.request = f" [{' '.join(filter(None, (call.request_id, call.identity)))}]" if call else ""
        return True


class _Writer(logging.Handler):
    """Writes lines in a thread of its own, the only one to stop where nobody reads them. Those that there is no room
    for by then are counted, and their number is told."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        # Not `queue.Queue`: garbage that is collected within its `put`, and has something to log, would lock us out.
        self._lines: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
        self._num_lost = 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        if self._lines.qsize() >= _MAX_WAITING:
            self._num_lost += 1
            return
        if self._num_lost:
            num_lost, self._num_lost = self._num_lost, 0
            _logger.error("nobody read the log: %d lines are lost", num_lost)
        try:
            self.put(self.format(record))
        except Exception:
            self.handleError(record)

    def put(self, line: str) -> None:
        self._lines.put(f"{line}\n".encode(errors="backslashreplace"))

    def flush(self) -> None:
        """Returns once all is written, or after a while."""
        written = threading.Event()
        self._lines.put(written)
        written.wait(_FLUSH_TIMEOUT_S)

    def _write(self) -> None:
        """Several lines at once, as the interpreter is given away with each write and may be long in coming back; no
        more than a pipe takes without another process's between them."""
        chunk = b""
        while True:
            item = b"" if chunk and self._lines.empty() else self._lines.get()
            if isinstance(item, bytes) and item and len(chunk) + len(item) <= select.PIPE_BUF:
                chunk += item
                continue
            with suppress(OSError):
                while chunk:
                    chunk = chunk[os.write(self._fd, chunk) :]
            chunk = b""
            if isinstance(item, bytes):
                chunk = item
            else:
                item.set()


def tell(line: str) -> None:
    """Writes a line that is no event, after all that was logged."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Writer):
            handler.put(line)


def flush() -> None:
    """Waits until what was logged is written, but not for ever where nobody reads it. `os._exit` alone does not."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def configure(level: str, log_format: str = "text") -> None:
    """Sends this process's logs to stderr, from `level` ("debug" … "error") up, as `log_format` ("text" or "json")."""
    is_json = log_format == "json"
    handler = _Writer(sys.stderr.fileno())
    # JSON has the two parts of `request` for themselves.
    as_json = JsonFormatter(_JSON_FORMAT, reserved_attrs=[*RESERVED_ATTRS, "request"])
    handler.setFormatter(as_json if is_json else logging.Formatter(_TEXT_FORMAT))
    handler.addFilter(_RequestFilter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # They tell of each request with its URL, and of its headers: those of downloads hold secrets.
    for library in ("httpx", "httpx2", "httpcore", "httpcore2"):
        logging.getLogger(library).setLevel(logging.WARNING)
    # gRPC writes metadata that is no UTF-8 to the log, a traceback with each: a stranger's flood, or a client's secret.
    logging.getLogger("grpc._cython.cygrpc").addFilter(lambda record: "Invalid encoding" not in record.msg)
    # OpenTelemetry writes the state of a trace that it cannot read: a stranger's words.
    logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)
