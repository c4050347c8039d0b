"""The messages of a conversation and their builders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

from parley.v1 import message_pb2
from parley_client.encoding import check_kind, join, refused, set_field


class Role(StrEnum):
    """Who speaks."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool, made by the model. `arguments` is JSON text; `id` goes back as `tool_call_id`."""

    id: str
    name: str
    arguments: str

    def parse_arguments(self) -> dict[str, Any]:
        """The arguments by name, not checked against the tool's schema.

        Raises:
            ValueError: they are incomplete, because the answer was cut off.
        """
        arguments: dict[str, Any] = json.loads(self.arguments)
        return arguments


@dataclass(frozen=True)
class Tool:
    """A function that the model may ask for. `parameters` is the JSON Schema of its arguments; None: it has none."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | str | None = None


AnyTool: TypeAlias = Tool | Mapping[str, Any] | message_pb2.Tool
"""What describes a tool: a Tool, a dict with its fields or with these inside {"type": "function", "function": ...}, or
a protobuf message."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation; `system`, `user`, `assistant` and `tool` build them."""

    role: Role
    content: str
    reasoning_content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""

    @property
    def proto(self) -> message_pb2.Message:
        """A new protobuf message with the same fields.

        Raises:
            InvalidRequest: a field cannot be encoded.
        """
        return self.to_proto("message")

    def to_proto(self, path: str) -> message_pb2.Message:
        """As `proto`; errors name the field as below `path`."""
        try:
            proto = message_pb2.Message(role=f"ROLE_{str(self.role).upper()}")
        except ValueError as error:
            raise refused(join(path, "role"), self.role, error) from error
        for field in ("content", "reasoning_content", "tool_call_id", "name"):
            set_field(proto, field, getattr(self, field), path)
        for i, call in enumerate(self.tool_calls):
            call_path = f"{path}.tool_calls[{i}]"
            check_kind(call, ToolCall, call_path)
            call_proto = proto.tool_calls.add()
            for field in ("id", "name", "arguments"):
                set_field(call_proto, field, getattr(call, field), call_path)
        return proto


def system(text: str) -> Message:
    """Instructions to the model; goes first."""
    return Message(Role.SYSTEM, text)


def user(text: str, *, name: str = "") -> Message:
    """What the person or program asks. `name` is for chat templates that tell speakers apart."""
    return Message(Role.USER, text, name=name)


def assistant(text: str, *, reasoning_content: str = "", tool_calls: Sequence[ToolCall] = ()) -> Message:
    """What the model said. A Reply can stand in its place."""
    return Message(Role.ASSISTANT, text, reasoning_content=reasoning_content, tool_calls=tuple(tool_calls))


def tool(content: str, *, tool_call_id: str, name: str = "") -> Message:
    """The result of the tool call `tool_call_id` (`ToolCall.id`)."""
    return Message(Role.TOOL, content, tool_call_id=tool_call_id, name=name)
