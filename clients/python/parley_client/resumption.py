"""Goes on with an answer whose stream broke: what to ask for next, and when. Both clients' streams use it."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import Any

from parley.v1 import chat_pb2
from parley_client.accumulator import Accumulator
from parley_client.errors import ParleyError, QueueFull, Unavailable

_FIRST_DELAY_S, _MAX_DELAY_S = 0.1, 5.0


class Resumption:
    """The calls of one stream: the first, and those that take the answer up where the one before broke off.

    Any server of the same model can go on: it is told the seed and the ids that are here. What it sends begins behind
    them, so the pieces of all calls together are those of an unbroken one.
    """

    def __init__(self, accumulator: Accumulator, args: Mapping[str, Any], max_resumes: int) -> None:
        """`args`: of each call, with the `timeout` of all together. `max_resumes`: in a row without a new piece."""
        self._accumulator = accumulator
        self._args = args
        self._max_resumes = max_resumes
        self._failures = 0
        timeout = args.get("timeout")
        self._deadline = None if timeout is None else time.monotonic() + timeout

    def note_progress(self) -> None:
        """To be called with each piece."""
        self._failures = 0

    def delay_after(self, error: ParleyError) -> float | None:
        """In how many seconds to go on; None where that would not help."""
        is_passing = isinstance(error, Unavailable) or (self._failures > 0 and isinstance(error, QueueFull))
        if not is_passing or not self._accumulator.can_resume or self._failures == self._max_resumes:
            return None
        self._failures += 1
        backoff_s: float = min(_FIRST_DELAY_S * 2 ** (self._failures - 1), _MAX_DELAY_S)
        jitter = random.uniform(0.8, 1.2)  # nosec B311
        delay_s = max(backoff_s * jitter, error.retry_after_s or 0.0)
        return min(delay_s, self._remaining_s())

    def call_args(self) -> dict[str, Any]:
        """Keyword arguments of the next call."""
        return dict(self._args) if self._deadline is None else {**self._args, "timeout": self._remaining_s()}

    def request(self) -> chat_pb2.GenerateRequest:
        """The request for what is still missing."""
        return self._accumulator.remainder()

    def _remaining_s(self) -> float:
        return float("inf") if self._deadline is None else max(0.0, self._deadline - time.monotonic())
