"""Tools and tool calls between the contract's messages and our own: checks, chat templates' form, deltas."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from parley.v1 import chat_pb2, message_pb2
from parleyd.errors import Unsupported, Violation
from parleyd.text.answer_format import AnswerFormat
from parleyd.text.json_object import load_object
from parleyd.text.tool_format.tool_format import ToolCallPiece, ToolFormat

_MAX_TOOLS = 128
_MAX_DESCRIPTION_CHARACTERS = 16_384
_MAX_PARAMETERS_CHARACTERS = 65_536
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MODES = message_pb2.ToolChoice.Mode

AnyRequest = chat_pb2.GenerateRequest | chat_pb2.CountTokensRequest


def violations(request: AnyRequest) -> Iterator[Violation]:
    """What is wrong with a request's tools, and with the calls and results in its messages."""
    if len(request.tools) > _MAX_TOOLS:
        yield Violation("tools", f"must hold at most {_MAX_TOOLS}, not {len(request.tools)}")
    else:
        yield from _tools_violations(request.tools)
    known_ids: set[str] = set()
    for i, message in enumerate(request.messages):
        yield from _message_violations(f"messages[{i}]", message, known_ids)
        known_ids |= {call.id for call in message.tool_calls}


def choice_violations(request: chat_pb2.GenerateRequest) -> Iterator[Violation]:
    """What is wrong with a request's `tool_choice`."""
    choice = request.tool_choice
    if choice.mode not in _MODES.values():
        yield Violation("tool_choice.mode", f"is no mode: {choice.mode}")
    if choice.name and choice.mode in (_MODES.MODE_AUTO, _MODES.MODE_NONE):
        yield Violation("tool_choice.name", f"contradicts {_MODES.Name(choice.mode)}")
    elif choice.name and choice.name not in {tool.name for tool in request.tools}:
        yield Violation("tool_choice.name", "must be one of the tools")
    if choice.mode == _MODES.MODE_REQUIRED and not request.tools:
        yield Violation("tool_choice.mode", "MODE_REQUIRED needs tools")


def unsupported(
    request: AnyRequest, answer_format: AnswerFormat, grammar_obstacle: str | None
) -> Iterator[Unsupported]:
    """What a valid request says about tools that this model cannot do."""
    if answer_format.tool_format is not None:
        if grammar_obstacle and isinstance(request, chat_pb2.GenerateRequest) and is_required(request.tool_choice):
            yield Unsupported("tool_choice", grammar_obstacle)
        return
    why = answer_format.no_tools_because
    if request.tools:
        yield Unsupported("tools", why)
    for i, message in enumerate(request.messages):
        if message.role == message_pb2.ROLE_TOOL:
            yield Unsupported(f"messages[{i}].role", why)
        if message.tool_calls:
            yield Unsupported(f"messages[{i}].tool_calls", why)


def is_required(choice: message_pb2.ToolChoice) -> bool:
    """Whether a call must be made."""
    return bool(choice.name) or choice.mode == _MODES.MODE_REQUIRED


def offered(request: AnyRequest) -> Sequence[message_pb2.Tool]:
    """The tools that the model is told of: none where it is to call none."""
    if isinstance(request, chat_pb2.GenerateRequest) and request.tool_choice.mode == _MODES.MODE_NONE:
        return ()
    return request.tools


def to_template_tools(tools: Sequence[message_pb2.Tool]) -> list[dict[str, Any]]:
    """Valid tools as chat templates take them."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": json.loads(tool.parameters) if tool.parameters else {"type": "object", "properties": {}},
            },
        }
        for tool in tools
    ]


def to_template_calls(calls: Sequence[message_pb2.ToolCall]) -> list[dict[str, Any]]:
    """Valid calls as chat templates take them."""
    return [
        {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
        for call in calls
    ]


def to_deltas(pieces: Sequence[ToolCallPiece]) -> list[message_pb2.ToolCallDelta]:
    """Pieces as a stream carries them."""
    return [
        message_pb2.ToolCallDelta(index=piece.index, id=piece.id, name=piece.name, arguments=piece.arguments)
        for piece in pieces
    ]


def to_calls(pieces: Sequence[ToolCallPiece]) -> list[message_pb2.ToolCall]:
    """Whole calls, given as one piece each."""
    return [message_pb2.ToolCall(id=piece.id, name=piece.name, arguments=piece.arguments) for piece in pieces]


def required_calls(
    request: chat_pb2.GenerateRequest, tool_format: ToolFormat, special_ids: Mapping[str, int], reasoning: str | None
) -> str:
    """What a request's answer must hold, as `grammar.formats` takes it: one call of the tool that is named, or at least
    one of any. `special_ids` and `reasoning` as there."""
    name = request.tool_choice.name
    before, between, after = tool_format.spelling
    return json.dumps(
        {
            "before": before if tool_format.is_bare else tool_format.opening + before,
            "between": None if name else between,
            "after": after,
            "tools": {
                tool.name: (*tool_format.spell_call(tool.name), _arguments_schema(tool))
                for tool in request.tools
                if name in ("", tool.name)
            },
            "special_ids": dict(special_ids),
            "reasoning": reasoning,
        }
    )


def _arguments_schema(tool: message_pb2.Tool) -> dict[str, Any]:
    if not tool.parameters:
        return {"type": "object", "additionalProperties": False}
    return {**json.loads(tool.parameters), "type": "object"}


def _tools_violations(tools: Sequence[message_pb2.Tool]) -> Iterator[Violation]:
    names: set[str] = set()
    for i, tool in enumerate(tools):
        path = f"tools[{i}]"
        if not _NAME.fullmatch(tool.name):
            yield Violation(f"{path}.name", "must be 1 to 64 of [A-Za-z0-9_-]")
        elif tool.name in names:
            yield Violation(f"{path}.name", "is another tool's name too")
        names.add(tool.name)
        yield from _length_violations(f"{path}.description", tool.description, _MAX_DESCRIPTION_CHARACTERS)
        yield from _length_violations(f"{path}.parameters", tool.parameters, _MAX_PARAMETERS_CHARACTERS)
        if tool.parameters and len(tool.parameters) <= _MAX_PARAMETERS_CHARACTERS:
            yield from _parameters_violations(f"{path}.parameters", tool.parameters)


def _length_violations(path: str, text: str, limit: int) -> Iterator[Violation]:
    if len(text) > limit:
        yield Violation(path, f"must have at most {limit} characters, not {len(text)}")


def _parameters_violations(path: str, text: str) -> Iterator[Violation]:
    try:
        schema = load_object(text)
    except ValueError as error:
        yield Violation(path, f"must be a JSON Schema: {error}")
        return
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if schema.get("type", "object") != "object":
        yield Violation(path, 'must be the JSON Schema of an object: its "type" is another')
    if not isinstance(properties, dict) or not all(isinstance(value, dict | bool) for value in properties.values()):
        yield Violation(path, 'must be a JSON Schema: "properties" must map names to schemas')
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        yield Violation(path, 'must be a JSON Schema: "required" must be a list of names')


def _message_violations(path: str, message: message_pb2.Message, known_ids: set[str]) -> Iterator[Violation]:
    if message.role != message_pb2.ROLE_ASSISTANT:
        for field in ("reasoning_content", "tool_calls"):
            if getattr(message, field):
                yield Violation(f"{path}.{field}", "belongs to messages of ROLE_ASSISTANT alone")
    if message.tool_call_id:
        if message.role != message_pb2.ROLE_TOOL:
            yield Violation(f"{path}.tool_call_id", "belongs to messages of ROLE_TOOL alone")
        elif message.tool_call_id not in known_ids:
            yield Violation(f"{path}.tool_call_id", "must be the id of a call in an earlier message")
    for i, call in enumerate(message.tool_calls):
        yield from _call_violations(f"{path}.tool_calls[{i}]", call)


def _call_violations(path: str, call: message_pb2.ToolCall) -> Iterator[Violation]:
    if not _NAME.fullmatch(call.name):
        yield Violation(f"{path}.name", "must be 1 to 64 of [A-Za-z0-9_-]")
    try:
        load_object(call.arguments)
    except ValueError as error:
        yield Violation(f"{path}.arguments", f"must be a JSON object: {error}")
