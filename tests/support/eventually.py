"""Waiting for what takes a moment to come true."""

from __future__ import annotations

import time
from collections.abc import Callable

_POLL_S = 0.005


def eventually(
    condition: Callable[[], object], what: str | Callable[[], str] = "it never came true", timeout_s: float = 10.0
) -> None:
    """Returns as soon as `condition` is true. Fails with `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(_POLL_S)
