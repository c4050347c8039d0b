"""Logs: one line an event on stderr, with the request id where there is one. Never prompts, answers or secrets."""

from __future__ import annotations

import logging
import sys

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from parleyd.telemetry.call import current_call

_TEXT_FORMAT = "%(asctime)s %(levelname)-7s %(name)s%(request)s %(message)s"
_JSON_FORMAT = "%(asctime)s %(levelname)s %(name)s %(request_id)s %(identity)s %(message)s"


class _RequestFilter(logging.Filter):
    """Adds the current call's request id and caller to each record."""

    def filter(self, record: logging.LogRecord) -> bool:
        call = current_call.get(None)
        record.request_id = call.request_id if call else None
        record.identity = call.identity if call else None
        record.request = f" [{' '.join(filter(None, (call.request_id, call.identity)))}]" if call else ""
        return True


def configure(level: str, log_format: str = "text") -> None:
    """Sends this process's logs to stderr, from `level` ("debug" … "error") up, as `log_format` ("text" or "json")."""
    is_json = log_format == "json"
    handler = logging.StreamHandler(sys.stderr)
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
