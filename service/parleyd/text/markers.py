"""Markers, and the white space around them, in a text that arrives in pieces."""

from __future__ import annotations

# Beyond this much white space before a marker is text: what is held back, and read again with each piece, stays short.
MAX_SPACE = 256


def end_before_space(text: str) -> int:
    """Where the text ends without the white space that may stand before a marker."""
    return max(len(text.rstrip()), len(text) - MAX_SPACE)


def num_matched(text: str, marker: str) -> int:
    """How much of `marker`, less than all of it, the text ends with."""
    start = text.find(marker[0], max(0, len(text) - len(marker) + 1))
    while start >= 0 and not marker.startswith(text[start:]):
        start = text.find(marker[0], start + 1)
    return len(text) - start if start >= 0 else 0
