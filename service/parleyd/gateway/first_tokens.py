"""How long first tokens take from when a request has its slot, by the length of its prompt."""

from __future__ import annotations

# Of a kind of prompt, before anything is said about it.
_MIN_SAMPLES = 8
# Estimates fall at once and rise by so much of what was seen: they say how long it takes at best of late.
_RISE = 0.1


class FirstTokenTimes:
    """Estimates by the prompt length's power of two, from what has been seen."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._num_samples: dict[int, int] = {}

    def observe(self, num_prompt_tokens: int, seconds: float) -> None:
        """A first token came so long after the slot."""
        size = num_prompt_tokens.bit_length()
        known = self._seconds.get(size, seconds)
        self._seconds[size] = min(seconds, known + _RISE * (seconds - known))
        self._num_samples[size] = self._num_samples.get(size, 0) + 1

    def at_best(self, num_prompt_tokens: int) -> float:
        """Seconds, from prompts that are no longer; 0 where none has been seen often enough."""
        size = num_prompt_tokens.bit_length()
        known = (
            self._seconds[seen] for seen, number in self._num_samples.items() if seen <= size and number >= _MIN_SAMPLES
        )
        return max(known, default=0.0)
