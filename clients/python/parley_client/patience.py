"""How long a call waits for a service in trouble, and in which steps. All of a client's calls use it."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import Any

from parley_client.errors import DeadlineExceeded, ParleyError, QueueFull, Unavailable

_FIRST_DELAY_S, _MAX_DELAY_S = 0.1, 5.0
_MAX_DOUBLINGS = 10  # more than it takes from one to the other, and no float is 2**1024
_ENDLESS_S = 2.0**32  # 136 years; gRPC takes what ends after the year 2262 for what has passed


def time_limit(timeout: float | None) -> float:
    """A timeout in seconds, `math.inf` where it is none. Raises ValueError for what is no number."""
    if timeout is None or timeout > _ENDLESS_S:
        return math.inf
    if math.isnan(timeout):
        raise ValueError(f"timeout must be a number of seconds, not {timeout}")
    return timeout


class Contact:
    """Whether a server of the client's target has ever answered: where none has, the target is likely wrong."""

    is_made = False


class Patience:
    """Failures in a row of one call and those that follow it, which share its timeout."""

    def __init__(
        self,
        args: Callable[[float], dict[str, Any]],
        timeout: float | None,
        max_failures: int,
        contact: Contact,
        num_retries: int = 0,
    ) -> None:
        """`args`: makes those of a call with a timeout. `timeout`: of all together, in seconds; None is no limit.

        `max_failures`: in a row. `num_retries`: before these, of a call that gRPC does not try again itself.
        """
        self._args = args
        self._max_failures = max_failures
        self._contact = contact
        self._num_retries = num_retries
        self._retries = 0
        self._failures = 0
        self._last: ParleyError | None = None
        self._deadline = time.monotonic() + time_limit(timeout)

    def note_progress(self) -> None:
        """To be called with each part of an answer."""
        self._contact.is_made = True
        self._failures = 0
        self._last = None

    def delay_after(self, error: ParleyError) -> float | None:
        """In how many seconds to call again; None where that would not help.

        An error that the timeout brings about gets a note of why there had to be another call.
        """
        if isinstance(error, DeadlineExceeded) and self._last is not None:
            error.add_note(f"before that: {self._last.message}")
        is_passing = isinstance(error, Unavailable) or (self._failures > 0 and isinstance(error, QueueFull))
        if not is_passing or self._failures == self._max_failures:
            return None
        self._failures += 1
        return self._delay_s(self._failures, error)

    def delay_before_again(self, error: ParleyError) -> float | None:
        """As `delay_after`, for a call that is to be made once more from its beginning.

        A server that died or is not ready may be back soon, and another may be there; one that never was will not.
        """
        if error.request_id is not None:
            self._contact.is_made = True
        if self._retries < self._num_retries and isinstance(error, Unavailable):
            self._retries += 1
            return self._delay_s(self._retries, error)
        delay_s = self.delay_after(error)
        return delay_s if self._contact.is_made else None

    def call_args(self) -> dict[str, Any]:
        """Keyword arguments of the next call."""
        return self._args(self._remaining_s())

    def _delay_s(self, num_tries: int, error: ParleyError) -> float:
        self._last = error
        num_doublings = min(num_tries - 1, _MAX_DOUBLINGS)
        backoff_s: float = min(_FIRST_DELAY_S * 2**num_doublings, _MAX_DELAY_S)
        jitter = random.uniform(0.8, 1.2)  # nosec B311
        delay_s = max(backoff_s * jitter, error.retry_after_s or 0.0)
        return min(delay_s, self._remaining_s())

    def _remaining_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())
