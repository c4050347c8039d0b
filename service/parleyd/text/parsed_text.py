"""What a stretch of generated text means: content, reasoning, tool calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain

from parleyd.text.tool_format.tool_format import ToolCallPiece


@dataclass(slots=True)
class ParsedText:
    """Text to append to each part of an answer."""

    content: str = ""
    reasoning_content: str = ""
    tool_calls: list[ToolCallPiece] = field(default_factory=list)

    def add_call(self, piece: ToolCallPiece) -> None:
        """Appends to the call that the last piece belongs to, or begins the next one."""
        if self.tool_calls and self.tool_calls[-1].index == piece.index:
            self.tool_calls[-1].arguments += piece.arguments
        else:
            self.tool_calls.append(piece)

    @classmethod
    def join(cls, parts: Iterable[ParsedText]) -> ParsedText:
        """All of `parts`, in order, as one; cheap for thousands of them."""
        parts = list(parts)
        arguments: dict[int, list[str]] = {}
        calls: dict[int, ToolCallPiece] = {}
        for piece in chain.from_iterable(part.tool_calls for part in parts):
            calls.setdefault(piece.index, piece)
            arguments.setdefault(piece.index, []).append(piece.arguments)
        return cls(
            content="".join(part.content for part in parts),
            reasoning_content="".join(part.reasoning_content for part in parts),
            tool_calls=[replace(call, arguments="".join(arguments[index])) for index, call in calls.items()],
        )
