"""Which tool format a model's chat template speaks, found by letting it write a call."""

from __future__ import annotations

import json
from typing import Any

from parleyd.errors import ParleyError
from parleyd.text.chat_template import ChatTemplate
from parleyd.text.parsed_text import ParsedText
from parleyd.text.tool_format.hermes import HERMES
from parleyd.text.tool_format.llama3 import LLAMA3
from parleyd.text.tool_format.mistral import MISTRAL
from parleyd.text.tool_format.mistral11 import MISTRAL11
from parleyd.text.tool_format.parser import ToolCallParser
from parleyd.text.tool_format.tool_format import ToolFormat

FORMATS = {tool_format.name: tool_format for tool_format in (HERMES, LLAMA3, MISTRAL, MISTRAL11)}

_NAME, _CALL_ID, _ARGUMENTS = "parley_probe", "parley000", {"x": "y"}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Probes.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]},
    },
}
_QUESTION: dict[str, Any] = {"role": "user", "content": "?"}
_CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": _CALL_ID, "function": {"name": _NAME, "arguments": _ARGUMENTS}}],
}


def knows_tools(template: ChatTemplate) -> bool:
    """Whether the template describes tools to the model."""
    return _NAME in _render(template, [_QUESTION])


def detect(template: ChatTemplate) -> ToolFormat | None:
    """The format in which the template writes an assistant's call; None if it is none of ours."""
    prompt, conversation = _render(template, [_QUESTION]), _render(template, [_QUESTION, _CALL])
    answer = conversation.removeprefix(prompt)
    return next((tool_format for tool_format in FORMATS.values() if _writes(tool_format, answer)), None)


def _render(template: ChatTemplate, messages: list[dict[str, Any]]) -> str:
    try:
        return template.render(messages, tools=[_TOOL])
    except ParleyError:  # there is no template, or it refuses what it does not know
        return ""


def _writes(tool_format: ToolFormat, answer: str) -> bool:
    parser = ToolCallParser(tool_format, [_NAME], lambda index: "")
    parsed: ParsedText = parser.push(answer)
    return parser.num_complete == 1 and json.loads(parsed.tool_calls[0].arguments) == _ARGUMENTS
