"""Tool calls in an answer's text, as it is written. One parser per generated sequence."""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import Enum, auto
from typing import Any

import regex

from parleyd.text.json_scanner import JsonObjectScanner
from parleyd.text.markers import MAX_SPACE, end_before_space, num_matched
from parleyd.text.parsed_text import ParsedText
from parleyd.text.tool_format.tool_format import SPACE, ToolCallPiece, ToolFormat

# `id`: some Mistral models write one of their own, which is not used.
_OBJECT_END = regex.compile(rf'{SPACE}(?:,{SPACE}"id"{SPACE}:{SPACE}"[^"\\]{{0,64}}"{SPACE})?\}}')


class _At(Enum):
    TEXT = auto()
    HEAD = auto()  # after the opening, or at a brace that may begin a bare call
    ARGUMENTS = auto()
    OBJECT_END = auto()
    BETWEEN = auto()  # after a call: another one, or the end of the calls


class ToolCallParser:
    """Splits text into content and calls; what has been returned after some text depends on that text alone, not on
    how it was cut.

    A call begins once its name, one of `names`, and its arguments' brace are there; until then it is content, which
    waits. From then on its arguments are passed on as they are written, up to where they end or are no JSON any more:
    such a call stays incomplete, and the text goes on as content. White space around calls is left out; other text
    comes as it is.

    `num_complete` counts the calls whose arguments have ended.
    """

    def __init__(self, tool_format: ToolFormat, names: Collection[str], call_id: Callable[[int], str]) -> None:
        self.num_complete = 0
        self._format = tool_format
        self._call_id = call_id
        self._names = frozenset(names)
        head = tool_format.head
        self._first = regex.compile(tool_format.first + head)
        self._bare = regex.compile(head) if tool_format.is_bare else None
        self._next = None if tool_format.next is None else regex.compile(tool_format.next + head)
        closing = tool_format.closing
        self._closing = None if closing is None else regex.compile(SPACE + regex.escape(closing))
        self._steps = {
            _At.TEXT: self._read_text,
            _At.HEAD: self._read_head,
            _At.ARGUMENTS: self._read_arguments,
            _At.OBJECT_END: self._read_object_end,
            _At.BETWEEN: self._read_between,
        }
        self._at = _At.TEXT
        self._head = self._first
        self._head_start = 0  # where in the held text the head begins, once in HEAD
        self._num_refused = 0  # how much of the held text is content if there is no head
        self._held = ""
        self._is_start = True
        self._follows_call = False
        self._num_calls = 0
        self._scanner = JsonObjectScanner()

    def push(self, text: str) -> ParsedText:
        """What the text adds. Text that may still become part of a call, or white space before one, is held back."""
        self._held += text
        parsed = ParsedText()
        while self._held and self._steps[self._at](parsed):
            pass
        return parsed

    def finish(self) -> ParsedText:
        """What is still held back, once no more text comes."""
        parsed = ParsedText()
        if self._at in (_At.OBJECT_END, _At.BETWEEN):
            self._follows_call = True
        self._release(parsed, len(self._held))
        return parsed

    # Each of these takes what it can from the held text; False: it needs more.

    def _read_text(self, parsed: ParsedText) -> bool:
        start = len(self._held) - len(self._held.lstrip())
        if self._bare and self._is_start:
            if start > MAX_SPACE:
                self._is_start = False
            elif start == len(self._held):
                return False
            elif self._held[start] == "{":
                return self._expect_head(self._bare, start, start + 1)
        opening = self._format.opening
        found = self._held.find(opening)
        if found >= 0:
            self._release(parsed, end_before_space(self._held[:found]))
            end = self._held.index(opening) + len(opening)
            return self._expect_head(self._first, end, end)
        num_safe = len(self._held) - num_matched(self._held, opening)
        self._release(parsed, end_before_space(self._held[:num_safe]))
        return False

    def _expect_head(self, head: Any, start: int, num_refused: int) -> bool:
        self._at, self._head, self._head_start, self._num_refused = _At.HEAD, head, start, num_refused
        return True

    def _read_head(self, parsed: ParsedText) -> bool:
        match = self._match_head(self._head, self._head_start)
        if match is None:
            self._at = _At.TEXT
            self._release(parsed, self._num_refused)
            return True
        return not match.partial and self._begin_call(match, parsed)

    def _match_head(self, head: Any, start: int = 0) -> Any:
        """The match of a head or, `partial`, of what may become one; None: there is none of a tool that is known."""
        match = head.match(self._held, start, partial=True)
        return match if match and (match.partial or match["name"] in self._names) else None

    def _begin_call(self, match: Any, parsed: ParsedText) -> bool:
        index = self._num_calls
        parsed.add_call(ToolCallPiece(index, self._call_id(index), match["name"]))
        self._num_calls += 1
        self._held = self._held[match.end() :]
        self._scanner, self._at = JsonObjectScanner(), _At.ARGUMENTS
        self._is_start = False
        return True

    def _read_arguments(self, parsed: ParsedText) -> bool:
        end = self._scanner.scan(self._held)
        if end:
            parsed.add_call(ToolCallPiece(self._num_calls - 1, arguments=self._held[:end]))
        self._held = self._held[end:]
        if self._scanner.is_done:
            self.num_complete += 1
            self._at = _At.OBJECT_END if self._format.arguments_marker is None else _At.BETWEEN
        elif self._scanner.is_broken:
            self._follows_call, self._at = False, _At.TEXT
        return True

    def _read_object_end(self, parsed: ParsedText) -> bool:
        match = _OBJECT_END.match(self._held, partial=True)
        if match is None:
            return self._leave_calls(0)
        if match.partial:
            return False
        self._held = self._held[match.end() :]
        self._at = _At.BETWEEN
        return True

    def _read_between(self, parsed: ParsedText) -> bool:
        following = self._next and self._match_head(self._next)
        if following and not following.partial:
            return self._begin_call(following, parsed)
        closing = self._closing and self._closing.match(self._held, partial=True)
        if closing and not closing.partial:
            return self._leave_calls(closing.end())
        return not following and not closing and self._leave_calls(0)

    def _leave_calls(self, num_dropped: int) -> bool:
        self._held = self._held[num_dropped:]
        self._follows_call, self._at = True, _At.TEXT
        return True

    def _release(self, parsed: ParsedText, num_chars: int) -> None:
        text, self._held = self._held[:num_chars], self._held[num_chars:]
        if self._follows_call:
            text = text.lstrip()
        if text:
            self._follows_call = False
            self._is_start = False
        parsed.content += text
