"""How many prompt tokens a step may take beside decoding streams, from what steps have cost so far. No torch."""

from __future__ import annotations

# A step with prompt tokens takes about this many times one without, at most, so that streams keep their pace.
_MAX_SLOWDOWN = 1.3
# Always granted, lest prompts wait for every stream to end. Twice as many would take a step to 1.7 times one without.
_MIN_TOKENS = 4
# Granted while the answers under way are few beside those that it would let begin, or can bear it.
_BURST_TOKENS = 512
_MAX_DECODES_PER_PROMPT = 6
# What they can bear: of the gaps between tokens, fewer than one in twenty may be slow. The others earn credit for it,
# and make up for slow ones that credit did not grant.
_SLOW_SHARE = 0.035
_MAX_CREDIT = 32.0
_WEIGHT = 0.2  # of the newest step in an estimate


class PrefillBudget:
    """Called by the scheduler with a step's decodes and the prompts that it could finish; told what steps have cost.

    Keeps the 95th percentile of the time between two tokens within twice the median while prompts keep coming.
    Estimates the seconds of a step of decodes alone, by their number's power of two, and what a prompt token adds.
    """

    def __init__(self) -> None:
        self._decode_seconds: dict[int, float] = {}
        self._token_seconds: float | None = None
        self._credit = _MAX_CREDIT  # gaps between tokens that may yet be slow, or below 0 that were

    def __call__(self, num_decodes: int, num_finished: float) -> int:
        """At least 1."""
        if num_decodes <= max(self._credit, _MAX_DECODES_PER_PROMPT * num_finished):
            return _BURST_TOKENS
        decode = self._decode_estimate(num_decodes)
        if decode is None or self._token_seconds is None:
            return _MIN_TOKENS
        return max(int((_MAX_SLOWDOWN - 1) * decode / max(self._token_seconds, 1e-9)), _MIN_TOKENS)

    def observe(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """A step of so many tokens has taken `seconds`."""
        decode = self._decode_estimate(num_decodes)
        # Where prompts have come ever since the start, a step with the fewest tokens of them tells enough.
        if num_prefill_tokens == 0 or (decode is None and num_prefill_tokens <= _MIN_TOKENS):
            bucket = num_decodes.bit_length()
            decode = self._decode_seconds[bucket] = _moved(self._decode_seconds.get(bucket), seconds)
        elif decode is not None:
            each = max(seconds - decode, 0.0) / num_prefill_tokens
            self._token_seconds = _moved(self._token_seconds, each)
        is_slow = decode is None or seconds > 2 * decode
        earned = num_decodes * (-1.0 if is_slow else _SLOW_SHARE)
        self._credit = min(max(self._credit + earned, -_MAX_CREDIT), _MAX_CREDIT)

    def _decode_estimate(self, num_decodes: int) -> float | None:
        """That of the nearest number of decodes seen; nothing for a step without any."""
        if num_decodes == 0:
            return 0.0
        wanted = num_decodes.bit_length()
        nearest = min(self._decode_seconds, key=lambda bucket: abs(bucket - wanted), default=None)
        return None if nearest is None else self._decode_seconds[nearest]


def _moved(estimate: float | None, value: float) -> float:
    return value if estimate is None else estimate + _WEIGHT * (value - estimate)
