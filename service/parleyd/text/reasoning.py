"""Reasoning in an answer's text, as it is written: `<think>…</think>`, as Qwen 3 and DeepSeek R1 write it."""

from __future__ import annotations

from enum import Enum, auto

from parleyd.text.markers import MAX_SPACE, end_before_space, num_matched
from parleyd.text.parsed_text import ParsedText

OPENING, CLOSING = "<think>", "</think>"


class _At(Enum):
    START = auto()
    REASONING = auto()
    AFTER = auto()  # the white space between reasoning and answer
    ANSWER = auto()


class ReasoningParser:
    """Splits text into reasoning, which only an answer's beginning can be, and content. White space around reasoning is
    left out; other text comes as it is. What has been returned after some text depends on that text alone.

    `is_open`: the opening is part of the prompt, and so is what has `begun` of the reasoning.
    """

    def __init__(self, *, is_open: bool = False, begun: str = "") -> None:
        self._at = _At.REASONING if is_open else _At.START
        self._has_begun = bool(begun.strip())  # there is reasoning other than white space
        self._num_told = num_matched(begun, CLOSING)  # of what is held back: it is in the prompt
        self._held = begun[len(begun) - self._num_told :]

    def push(self, text: str) -> ParsedText:
        """What the text adds. Text that may be part of a marker, or white space around one, is held back."""
        if self._at is _At.ANSWER:
            return ParsedText(content=text)
        self._held += text
        parsed = ParsedText()
        if self._at is _At.START:
            self._read_start()
        if self._at is _At.REASONING:
            self._read_reasoning(parsed)
        if self._at is _At.AFTER:
            self._held = self._held.lstrip()
            self._at = _At.ANSWER if self._held else _At.AFTER
        if self._at is _At.ANSWER:
            parsed.content, self._held = self._held, ""
        return parsed

    def finish(self) -> ParsedText:
        """What is still held back, once no more text comes."""
        parsed = ParsedText()
        if self._at is _At.REASONING:
            self._add_reasoning(parsed, self._held[: end_before_space(self._held)])
        elif self._at is _At.START:
            parsed.content = self._held
        return parsed

    def _read_start(self) -> None:
        begin = self._held.lstrip()
        if len(self._held) - len(begin) > MAX_SPACE:
            self._at = _At.ANSWER
        elif begin.startswith(OPENING):
            self._held, self._at = begin.removeprefix(OPENING), _At.REASONING
        elif not OPENING.startswith(begin):
            self._at = _At.ANSWER

    def _read_reasoning(self, parsed: ParsedText) -> None:
        reasoning, closing, rest = self._held.partition(CLOSING)
        if closing:
            self._add_reasoning(parsed, reasoning[: end_before_space(reasoning)])
            self._held, self._at = rest, _At.AFTER
            return
        safe = self._held[: len(self._held) - num_matched(self._held, CLOSING)]
        end = end_before_space(safe)
        self._add_reasoning(parsed, safe[:end])
        self._held = self._held[end:]

    def _add_reasoning(self, parsed: ParsedText, text: str) -> None:
        if not self._has_begun:
            text = text.lstrip()
        self._has_begun = self._has_begun or bool(text)
        parsed.reasoning_content += text[self._num_told :]
        self._num_told = max(0, self._num_told - len(text))
