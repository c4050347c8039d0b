"""Stop strings in a text that arrives in pieces. One matcher per generated sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopResult(NamedTuple):
    """What one step made: text that is safe to send, and the stop string that ended the answer, if one did."""

    text: str
    stop_string: str | None


class StopMatcher:
    """Finds the first stop string to complete; of several completing in the same push, the earliest start wins,
    then the first listed.

    Text that may still turn out to belong to a stop string is held back: the longest suffix that is a proper prefix of
    some stop string, no more. Each character costs O(number of stop strings) (Knuth, Morris and Pratt, 1977).
    """

    def __init__(self, stop_strings: Sequence[str], *, include: bool = False) -> None:
        """`include` keeps the matched string in the text. Raises ValueError for an empty stop string."""
        self._searches = [_Search(stop_string) for stop_string in stop_strings]
        self._include = include
        self._held = ""
        self._is_over = False

    def push(self, text: str, *, searching: bool = True) -> StopResult:
        """Takes the text of one step. Not `searching`: the text is safe and no match may contain any of it.

        After a match every further text is dropped.
        """
        if self._is_over:
            return StopResult("", None)
        if not searching:
            for search in self._searches:
                search.restart()
            return StopResult(self.finish() + text, None)
        pending = self._held + text
        start, found, num_held = len(pending), None, 0
        for search in self._searches:
            end = search.advance(text)
            if end is None:
                num_held = max(num_held, search.num_matched)
            elif (begin := len(self._held) + end - len(search.stop_string)) < start:
                start, found = begin, search.stop_string
        if found is not None:
            self._is_over, self._held = True, ""
            return StopResult(pending[: start + len(found)] if self._include else pending[:start], found)
        num_safe = len(pending) - num_held
        self._held = pending[num_safe:]
        return StopResult(pending[:num_safe], None)

    def finish(self) -> str:
        """The text still held back, once no more will come."""
        held, self._held = self._held, ""
        return held


class _Search:
    """One stop string and how much of it the text so far ends with."""

    def __init__(self, stop_string: str) -> None:
        if not stop_string:
            raise ValueError("a stop string is empty")
        self.stop_string = stop_string
        self.num_matched = 0
        self._borders = _borders(stop_string)

    def restart(self) -> None:
        self.num_matched = 0

    def advance(self, text: str) -> int | None:
        """Reads on; the index in `text` just after the first match, or None."""
        stop_string, borders, matched = self.stop_string, self._borders, self.num_matched
        position, length = 0, len(text)
        while position < length:
            if matched == 0:
                position = text.find(stop_string[0], position)  # most text is nowhere near a stop string
                if position < 0:
                    break
            while matched and text[position] != stop_string[matched]:
                matched = borders[matched - 1]
            if text[position] == stop_string[matched]:
                matched += 1
            position += 1
            if matched == len(stop_string):
                return position
        self.num_matched = matched
        return None


def _borders(pattern: str) -> list[int]:
    """For each prefix of `pattern`, the length of its longest proper prefix that is also its suffix."""
    borders = [0]
    for char in pattern[1:]:
        length = borders[-1]
        while length and char != pattern[length]:
            length = borders[length - 1]
        borders.append(length + 1 if char == pattern[length] else 0)
    return borders
