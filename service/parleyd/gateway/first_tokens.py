"""How long first tokens take from when a request has its slot, by the length of what it prefills."""

from __future__ import annotations

import time
from dataclasses import dataclass

# Of a length, before anything is said about it.
_MIN_SAMPLES = 8
# Estimates fall at once and rise by so much of what was seen: they say how long it takes at best of late.
_RISE = 0.1
# What is older says nothing about now: where an estimate has all requests refused, nothing is seen that could mend it.
_MAX_AGE_S = 30.0


@dataclass
class _Estimate:
    seconds: float
    seen: float  # last, on the monotonic clock
    num_samples: int = 0

    @property
    def counts(self) -> bool:
        return self.num_samples >= _MIN_SAMPLES and time.monotonic() - self.seen <= _MAX_AGE_S


class FirstTokenTimes:
    """Estimates by the length's power of two, from what has been seen of late."""

    def __init__(self) -> None:
        self._estimates: dict[int, _Estimate] = {}

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A first token came so long after the slot."""
        now = time.monotonic()
        known = self._estimates.setdefault(num_tokens.bit_length(), _Estimate(seconds, now))
        known.seconds = min(seconds, known.seconds + _RISE * (seconds - known.seconds))
        known.seen = now
        known.num_samples += 1

    def at_best(self, num_tokens: int) -> float:
        """Seconds, from requests that were no longer; 0 where none has been seen often enough."""
        size = num_tokens.bit_length()
        known = (each.seconds for seen, each in self._estimates.items() if seen <= size and each.counts)
        return max(known, default=0.0)
