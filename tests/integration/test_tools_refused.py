"""Tools, choices and messages about them that are refused, each by the name of its field."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from parley.v1 import chat_pb2, message_pb2
from tests.support.gateway import GatewayThread
from tests.support.requests import ask, error_info_of, reason_of, violated_fields
from tests.support.tools import CLOCK, JSON_OBJECT, MODE, REQUIRED, TOOLS, Families, conversation, saying


def tool(**fields: str) -> message_pb2.Tool:
    return message_pb2.Tool(**{"name": "f", **fields})


@pytest.mark.parametrize(
    ("tools", "fields"),
    [
        ([tool(name="")], ["tools[0].name"]),
        ([tool(name="a b"), tool(name="x" * 65)], ["tools[0].name", "tools[1].name"]),
        ([tool(), tool()], ["tools[1].name"]),
        ([tool(parameters="{")], ["tools[0].parameters"]),
        ([tool(parameters="[]")], ["tools[0].parameters"]),
        ([tool(parameters='{"type": "string"}')], ["tools[0].parameters"]),
        ([tool(parameters='{"properties": []}')], ["tools[0].parameters"]),
        ([tool(parameters='{"properties": {"a": 1}}')], ["tools[0].parameters"]),
        ([tool(parameters='{"required": "a"}')], ["tools[0].parameters"]),
        ([tool(parameters='{"minProperties": NaN}')], ["tools[0].parameters"]),
        ([tool(parameters='{"a":' * 50_000)], ["tools[0].parameters"]),
        ([tool(parameters='{"a":' * 10_000)], ["tools[0].parameters"]),
        ([tool(description="x" * 16_385)], ["tools[0].description"]),
        ([tool(name=f"f{i}") for i in range(129)], ["tools"]),
    ],
)
def test_a_bad_tool_is_refused_by_name(families: Families, tools: list[message_pb2.Tool], fields: list[str]) -> None:
    messages = ask("x").messages
    for method, request in (
        (families["qwen"].stub.Generate, chat_pb2.GenerateRequest(messages=messages, tools=tools)),
        (families["qwen"].stub.CountTokens, chat_pb2.CountTokensRequest(messages=messages, tools=tools)),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            method(request, timeout=20)
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert violated_fields(raised.value) == fields


BAD_PATTERN = tool(parameters='{"properties": {"a": {"type": "string", "pattern": "("}}}')


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": [CLOCK, BAD_PATTERN], "tool_choice": REQUIRED}, "tools[1].parameters"),
        ({"tools": [CLOCK, BAD_PATTERN], "tool_choice": message_pb2.ToolChoice(name="f")}, "tools[1].parameters"),
        ({"tools": TOOLS, "tool_choice": REQUIRED, "response_format": JSON_OBJECT}, "response_format"),
        ({"tools": TOOLS, "tool_choice": REQUIRED, "resume": chat_pb2.Resume(token_ids=b"No")}, "resume.token_ids"),
        ({"tools": TOOLS, "tool_choice": message_pb2.ToolChoice(name="f")}, "tool_choice.name"),
        (
            {"tools": TOOLS, "tool_choice": message_pb2.ToolChoice(name=CLOCK.name, mode=MODE.MODE_NONE)},
            "tool_choice.name",
        ),
        (
            {"tools": TOOLS, "tool_choice": message_pb2.ToolChoice(name=CLOCK.name, mode=MODE.MODE_AUTO)},
            "tool_choice.name",
        ),
        ({"tool_choice": REQUIRED}, "tool_choice.mode"),
        ({"tool_choice": message_pb2.ToolChoice(mode=99)}, "tool_choice.mode"),  # type: ignore[arg-type]
    ],
)
def test_calls_can_only_be_demanded_where_they_can_be_made(
    families: Families, fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        families["qwen"].stub.Generate(ask("x", **fields), timeout=60)
    assert violated_fields(raised.value) == [field]


def test_a_format_of_the_whole_answer_leaves_no_room_for_tools(families: Families) -> None:
    request = ask(saying("qwen", "{}"), tools=TOOLS, response_format=JSON_OBJECT)
    with pytest.raises(grpc.RpcError) as raised:
        families["qwen"].stub.Generate(request, timeout=60)
    assert error_info_of(raised.value).metadata["field"] == "response_format"
    request.tool_choice.mode = MODE.MODE_NONE
    assert families["qwen"].stub.Generate(request, timeout=60).choices[0].message.content == "{}"


USER, ASSISTANT, RESULT = message_pb2.ROLE_USER, message_pb2.ROLE_ASSISTANT, message_pb2.ROLE_TOOL


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": USER, "reasoning_content": "hm"}, "reasoning_content"),
        ({"role": USER, "tool_calls": [message_pb2.ToolCall(name="f", arguments="{}")]}, "tool_calls"),
        ({"role": ASSISTANT, "tool_call_id": "a"}, "tool_call_id"),
        ({"role": RESULT, "tool_call_id": "unknown"}, "tool_call_id"),
        ({"role": ASSISTANT, "tool_calls": [message_pb2.ToolCall(arguments="{}")]}, "tool_calls[0].name"),
        ({"role": ASSISTANT, "tool_calls": [message_pb2.ToolCall(name="f")]}, "tool_calls[0].arguments"),
        (
            {"role": ASSISTANT, "tool_calls": [message_pb2.ToolCall(name="f", arguments="[]")]},
            "tool_calls[0].arguments",
        ),
    ],
)
def test_fields_of_messages_must_make_sense(families: Families, message: dict[str, Any], field: str) -> None:
    request = ask("x")
    request.messages.add(**message)
    with pytest.raises(grpc.RpcError) as raised:
        families["qwen"].stub.Generate(request, timeout=20)
    assert violated_fields(raised.value) == [f"messages[1].{field}"]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (conversation("abcdefghi")[1], "messages[1].tool_calls"),
        (message_pb2.Message(role=RESULT, content="sunny"), "messages[1].role"),
        (message_pb2.Message(role=USER, content="x", name="Ada"), "messages[1].name"),
    ],
)
def test_what_the_template_would_leave_out_is_not_supported(
    gateway: GatewayThread, message: message_pb2.Message, field: str
) -> None:
    request = ask("x")
    request.messages.append(message)
    with pytest.raises(grpc.RpcError) as raised:
        gateway.stub.Generate(request, timeout=20)
    assert reason_of(raised.value) == "UNSUPPORTED"
    assert error_info_of(raised.value).metadata["field"] == field


def test_a_result_may_name_its_tool_though_the_template_knows_no_names(families: Families) -> None:
    messages = conversation("abcdefghi")
    messages[-1].name = "get_weather"
    assert families["qwen"].stub.CountTokens(chat_pb2.CountTokensRequest(messages=messages), timeout=20)


@pytest.mark.parametrize("content", ["", "It is"])
def test_a_message_with_calls_cannot_be_continued(families: Families, content: str) -> None:
    messages = conversation("abcdefghi")[:2]
    messages[-1].content = content
    for method, request in (
        (families["qwen"].stub.Generate, chat_pb2.GenerateRequest),
        (families["qwen"].stub.CountTokens, chat_pb2.CountTokensRequest),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            method(request(messages=messages, continue_final_message=True), timeout=20)
        assert raised.value.details() == (
            "invalid request: continue_final_message: contradicts tool_calls in the last message"
        )


def test_counting_with_tools_needs_them_supported_too(gateway: GatewayThread) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        gateway.stub.CountTokens(chat_pb2.CountTokensRequest(messages=ask("x").messages, tools=TOOLS), timeout=20)
    assert error_info_of(raised.value).metadata["field"] == "tools"
