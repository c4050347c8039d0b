"""How many prompt tokens a step may take beside decoding streams, from what steps have cost so far. No torch."""

from __future__ import annotations

# A step with prompt tokens takes about this many times one without, at most, so that streams keep their pace.
_MAX_SLOWDOWN = 1.8
# Always granted, lest prompts wait for every stream to end.
_MIN_TOKENS = 8
# Granted while few steps have been slow: a short prompt then takes one slow step, which streams notice less than many.
_BURST_TOKENS = 64
_MAX_SLOW_SHARE = 0.03  # so that slow steps stay below one in twenty
_WEIGHT, _SLOW_WEIGHT = 0.2, 0.02  # of the newest step in an estimate


class PrefillBudget:
    """Called by the scheduler with the number of decodes of a step; told by the engine what each step has cost.

    Keeps the 95th percentile of the time between two tokens within twice the median while prompts keep coming.
    Estimates the seconds of a step of decodes alone, by their number's power of two, and what a prompt token adds.
    """

    def __init__(self) -> None:
        self._decode_seconds: dict[int, float] = {}
        self._token_seconds: float | None = None
        self._slow_share = 0.0

    def __call__(self, num_decodes: int) -> int:
        """At least 1."""
        decode = self._decode_estimate(num_decodes)
        if decode is None or self._token_seconds is None:
            return _BURST_TOKENS
        steady = int((_MAX_SLOWDOWN - 1) * decode / max(self._token_seconds, 1e-9))
        return max(steady, _BURST_TOKENS if self._slow_share <= _MAX_SLOW_SHARE else _MIN_TOKENS)

    def observe(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """A step of so many tokens has taken `seconds`."""
        if num_prefill_tokens == 0:
            bucket = num_decodes.bit_length()
            self._decode_seconds[bucket] = _moved(self._decode_seconds.get(bucket), seconds)
        elif (decode := self._decode_estimate(num_decodes)) is not None:
            each = max(seconds - decode, 0.0) / num_prefill_tokens
            self._token_seconds = _moved(self._token_seconds, each)
        if num_decodes and (decode := self._decode_estimate(num_decodes)) is not None:
            self._slow_share = _moved(self._slow_share, float(seconds > 2 * decode), _SLOW_WEIGHT)

    def _decode_estimate(self, num_decodes: int) -> float | None:
        """That of the nearest number of decodes seen; nothing for a step without any."""
        if num_decodes == 0:
            return 0.0
        wanted = num_decodes.bit_length()
        nearest = min(self._decode_seconds, key=lambda bucket: abs(bucket - wanted), default=None)
        return None if nearest is None else self._decode_seconds[nearest]


def _moved(estimate: float | None, value: float, weight: float = _WEIGHT) -> float:
    return value if estimate is None else estimate + weight * (value - estimate)
