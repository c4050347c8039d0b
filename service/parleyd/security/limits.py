"""How many calls each identity has open, and how many requests it has made lately."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from parleyd.errors import ClientLimit
from parleyd.security.caller import Caller, Rules

_RETRY_S = 1.0
_MINUTE_S = 60.0
_SWEEP_AT = 1024  # identities; there may be as many as addresses
_ROUNDING = 1e-3  # of a request


@dataclass
class _Usage:
    """A token bucket of a minute's requests, kept as the time when it will be full again."""

    full_at: float
    open_calls: int = 0


class Limits:
    """Counts by identity; callers without limits cost nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._usage: dict[str, _Usage] = {}
        self._sweep_at = _SWEEP_AT

    def enter(self, caller: Caller, num_requests: int) -> None:
        """A call begins; `leave` must follow. Raises ClientLimit.

        A batch may take more than is left, as a debt that later requests wait for: one larger than a minute's requests
        could never run otherwise.
        """
        rules = caller.rules
        if not _has_limits(rules):
            return
        now = self._clock()
        usage = self._usage_of(caller.identity, now)
        if rules.max_open_calls is not None and usage.open_calls >= rules.max_open_calls:
            raise ClientLimit(f"this client has {usage.open_calls} calls open already", _RETRY_S)
        if (rate := rules.requests_per_minute) is not None:
            full_at = max(usage.full_at, now)
            used = (full_at - now) * rate / _MINUTE_S
            if used + 1 > rate + _ROUNDING:
                raise ClientLimit(
                    f"this client may make {rate} requests a minute", (used + 1 - rate) * _MINUTE_S / rate
                )
            usage.full_at = full_at + num_requests * _MINUTE_S / rate
        usage.open_calls += 1

    def leave(self, caller: Caller) -> None:
        """The call has ended."""
        if _has_limits(caller.rules):
            self._usage[caller.identity].open_calls -= 1

    def _usage_of(self, identity: str, now: float) -> _Usage:
        usage = self._usage.get(identity)
        if usage is None:
            if len(self._usage) >= self._sweep_at:
                self._usage = {name: one for name, one in self._usage.items() if one.open_calls or one.full_at > now}
                self._sweep_at = max(_SWEEP_AT, 2 * len(self._usage))
            usage = self._usage[identity] = _Usage(now)
        return usage


def _has_limits(rules: Rules) -> bool:
    return rules.max_open_calls is not None or rules.requests_per_minute is not None
