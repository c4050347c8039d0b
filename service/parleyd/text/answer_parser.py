"""The text of one generated sequence, split into reasoning, content and tool calls."""

from __future__ import annotations

from parleyd.text.parsed_text import ParsedText
from parleyd.text.reasoning import ReasoningParser
from parleyd.text.tool_format.parser import ToolCallParser


class AnswerParser:
    """Fed with all of the text in order; what it returns depends on the text alone, not on how it was cut."""

    def __init__(self, reasoning: ReasoningParser | None = None, tool_calls: ToolCallParser | None = None) -> None:
        """None: the text holds no such thing."""
        self._reasoning = reasoning
        self._tool_calls = tool_calls

    @property
    def num_complete_calls(self) -> int:
        """Tool calls whose arguments have ended."""
        return self._tool_calls.num_complete if self._tool_calls else 0

    def push(self, text: str) -> ParsedText:
        """What the text adds to the answer."""
        return self._find_calls(self._reasoning.push(text) if self._reasoning else ParsedText(text))

    def finish(self) -> ParsedText:
        """What is still held back, once no more text comes."""
        parsed = self._find_calls(self._reasoning.finish() if self._reasoning else ParsedText())
        return ParsedText.join([parsed, self._tool_calls.finish()]) if self._tool_calls else parsed

    def _find_calls(self, parsed: ParsedText) -> ParsedText:
        if self._tool_calls is None or not parsed.content:
            return parsed
        found = self._tool_calls.push(parsed.content)
        found.reasoning_content = parsed.reasoning_content
        return found
