"""Markers in a text that arrives in pieces."""

from __future__ import annotations


def num_matched(text: str, marker: str) -> int:
    """How much of `marker`, less than all of it, the text ends with."""
    longest = min(len(text), len(marker) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(marker[:length])), 0)
