"""Logs: one line an event on stderr, with the request id where there is one. Never prompts, answers or secrets."""

from __future__ import annotations

import logging
import sys

from parleyd.telemetry.call import current_call

_FORMAT = "%(asctime)s %(levelname)-7s %(name)s%(request)s %(message)s"


class _RequestFilter(logging.Filter):
    """Adds the current call's request id to each record."""

    def filter(self, record: logging.LogRecord) -> bool:
        call = current_call.get(None)
        record.request = f" [{call.request_id}]" if call else ""
        return True


def configure(level: str) -> None:
    """Sends this process's logs to stderr, from `level` ("debug" … "error") up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT))
    handler.addFilter(_RequestFilter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
