"""The builders of messages."""

from __future__ import annotations

import pytest

from parley.v1 import message_pb2
from parley_client import InvalidRequest, Message, Role, ToolCall, assistant, system, tool, user


def test_builders_set_the_role_and_the_text():
    call = ToolCall(id="call-0", name="weather", arguments="{}")
    assert system("Be kind.") == Message(Role.SYSTEM, "Be kind.")
    assert user("Hi", name="Ann") == Message(Role.USER, "Hi", name="Ann")
    assert assistant("Hm", reasoning_content="why", tool_calls=[call]) == Message(Role.ASSISTANT, "Hm", "why", (call,))
    assert tool("sunny", tool_call_id="call-0") == Message(Role.TOOL, "sunny", tool_call_id="call-0")


def test_messages_become_protobuf_messages():
    call = ToolCall(id="call-0", name="weather", arguments="{}")
    assert assistant("Hm", reasoning_content="why", tool_calls=[call]).proto == message_pb2.Message(
        role=message_pb2.ROLE_ASSISTANT,
        content="Hm",
        reasoning_content="why",
        tool_calls=[message_pb2.ToolCall(id="call-0", name="weather", arguments="{}")],
    )
    assert tool("sunny", tool_call_id="call-0", name="weather").proto == message_pb2.Message(
        role=message_pb2.ROLE_TOOL, content="sunny", tool_call_id="call-0", name="weather"
    )


@pytest.mark.parametrize("text", ["", "\0", "🦜", "e\u0301", "x" * 100_000])
def test_any_text_is_kept_as_it_is(text):
    assert user(text).proto.content == text


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (user("a\ud800"), "message.content"),
        (user("a", name="\udfff"), "message.name"),
        (tool("a", tool_call_id="\ud800"), "message.tool_call_id"),
        (assistant("a", reasoning_content="\ud800"), "message.reasoning_content"),
        (
            assistant("", tool_calls=[ToolCall("", "", ""), ToolCall("", "", "\ud800")]),
            "message.tool_calls[1].arguments",
        ),
    ],
)
def test_lone_surrogates_are_refused_with_the_field(message, field):
    with pytest.raises(InvalidRequest, match="lone surrogate") as caught:
        _ = message.proto
    assert [violation.field for violation in caught.value.violations] == [field]
    assert caught.value.reason == "INVALID_REQUEST"


def test_a_calls_arguments_are_an_object_unless_it_was_cut_off():
    assert ToolCall("call-0", "weather", '{"city": "Bern"}').parse_arguments() == {"city": "Bern"}
    with pytest.raises(ValueError, match="Unterminated"):
        ToolCall("call-0", "weather", '{"city": "Be').parse_arguments()
