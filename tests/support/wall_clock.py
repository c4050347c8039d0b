"""A wall clock that somebody sets."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_DAY_S = 86400.0


@contextmanager
def jumping_clock(thread: threading.Thread | None = None) -> Iterator[None]:
    """Whenever `thread`, or any, asks Python for the time, it is right or a day off, to either side.

    gRPC's core keeps the true time, so calls that arrive meanwhile may have no deadline.
    """
    true_time = time.time

    def jumping() -> float:
        is_here = thread in (None, threading.current_thread())
        return true_time() + (random.choice((-_DAY_S, 0.0, _DAY_S)) if is_here else 0.0)

    time.time = jumping
    try:
        yield
    finally:
        time.time = true_time
