"""Tools and reasoning over the wire: chat templates of several families, a worker that writes what it is told to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from transformers import AutoTokenizer

from parley.v1 import chat_pb2, generation_pb2, message_pb2
from tests.support import tiny_tokenizer, tool_templates
from tests.support.gateway import GatewayThread, scripted_command, scripted_settings
from tests.support.requests import ask, error_info_of, reason_of, violated_fields
from tests.support.tiny_tokenizer import CHATML_TEMPLATE, write_tiny_tokenizer

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = message_pb2.Tool(name="get_weather", description="Tells the weather.", parameters=json.dumps(SCHEMA))
CLOCK = message_pb2.Tool(name="get_time")
TOOLS = [WEATHER, CLOCK]
BERN = '{"city": "Bern \\u2764 <ok>"}'
MODE = message_pb2.ToolChoice.Mode

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen": {"template": tool_templates.QWEN},
    "llama": {"template": tool_templates.LLAMA},
    "mistral": {"template": tool_templates.MISTRAL, "specials": ["[TOOL_CALLS]"]},
    "mistral11": {"template": tool_templates.MISTRAL11, "specials": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"]},
    "chatml": {"template": CHATML_TEMPLATE, "settings": {"tool_format": "hermes"}},
    "thinking": {"template": tool_templates.QWEN_REASONING},
    "opened": {"template": tool_templates.OPENED_REASONING},
    "opened with tools": {
        "template": tool_templates.QWEN.removesuffix("{%- endif %}\n") + "{{- '<think>\n' }}{%- endif %}"
    },
}
# Mistral's markers are tokens of their own, and special.
SPECIAL_IDS = {b"[TOOL_CALLS]": tiny_tokenizer.VOCAB_SIZE, b"[ARGS]": tiny_tokenizer.VOCAB_SIZE + 1}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, GatewayThread]]:
    """Gateways by family, each started when it is first asked for."""
    with ExitStack() as stack:

        class Started(dict[str, GatewayThread]):
            def __missing__(self, name: str) -> GatewayThread:
                family = FAMILIES[name]
                specials = family.get("specials", ())
                folder = write_tiny_tokenizer(
                    tmp_path_factory.getbasetemp() / name,
                    chat_template=family["template"],
                    further_specials=specials,
                )
                vocab_size = str(tiny_tokenizer.VOCAB_SIZE + len(specials))
                command = scripted_command(folder, "--step-delay", "0.001", "--vocab-size", vocab_size)
                settings = scripted_settings(**family.get("settings", {}))
                self[name] = stack.enter_context(GatewayThread(settings, command))
                return self[name]

        yield Started()


def spell(family: str, name: str, arguments: str) -> str:
    """A call as a model of the family writes it."""
    if family == "llama":
        return f'{{"name": "{name}", "parameters": {arguments}}}'
    if family == "mistral11":
        return f"[TOOL_CALLS]{name}[ARGS]{arguments}"
    if family == "mistral":
        return f'[TOOL_CALLS] [{{"name": "{name}", "arguments": {arguments}}}]'
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def saying(family: str, text: str) -> str:
    """A message to which the model answers with this text."""
    if not family.startswith("mistral"):
        return f"«{text}»"
    ids = b" ".join(b"%d" % byte for byte in text.encode()).decode()
    for marker, token_id in SPECIAL_IDS.items():
        ids = ids.replace(" ".join(map(str, marker)), str(token_id))
    return f"«!ids {ids}»"


def whole(responses: list[chat_pb2.GenerateStreamResponse]) -> message_pb2.Message:
    """The message that a stream's deltas add up to."""
    message = message_pb2.Message(role=message_pb2.ROLE_ASSISTANT)
    for response in responses:
        message.content += response.content
        message.reasoning_content += response.reasoning_content
        for delta in response.tool_calls:
            if delta.index == len(message.tool_calls):
                assert delta.id and delta.name
                message.tool_calls.add(id=delta.id, name=delta.name)
            else:
                assert (delta.id, delta.name) == ("", "")
            message.tool_calls[delta.index].arguments += delta.arguments
    return message


@pytest.mark.parametrize("family", ["qwen", "llama", "mistral", "mistral11", "chatml"])
def test_a_call_arrives_as_one_whole_or_streamed(families: dict[str, GatewayThread], family: str) -> None:
    stub = families[family].stub
    request = ask(saying(family, spell(family, "get_weather", BERN)), tools=TOOLS, seed=7)
    choice = stub.Generate(request, timeout=20).choices[0]
    [call] = choice.message.tool_calls
    assert (call.name, call.arguments, choice.message.content) == ("get_weather", BERN, "")
    assert len(call.id) == 9 and call.id.isalnum()
    assert choice.finish_reason == generation_pb2.FINISH_REASON_TOOL_CALLS

    responses = list(stub.GenerateStream(request, timeout=20))
    assert whole(responses) == choice.message
    assert [i for r in responses for i in r.token_ids] == list(choice.token_ids)
    assert responses[-1].finish_reason == generation_pb2.FINISH_REASON_TOOL_CALLS
    assert sum(bool(r.tool_calls) for r in responses) > 3  # as they were made


def test_several_calls_and_text_before_them(families: dict[str, GatewayThread]) -> None:
    text = "Both.\n\n" + spell("qwen", "get_weather", BERN) + "\n" + spell("qwen", "get_time", "{}")
    message = families["qwen"].stub.Generate(ask(saying("qwen", text), tools=TOOLS), timeout=20).choices[0].message
    assert message.content == "Both."
    assert [(call.name, call.arguments) for call in message.tool_calls] == [("get_weather", BERN), ("get_time", "{}")]
    assert len({call.id for call in message.tool_calls}) == 2


@pytest.mark.parametrize("family", ["qwen", "mistral", "mistral11"])
def test_text_without_calls_is_content(families: dict[str, GatewayThread], family: str) -> None:
    text = "Plain <tool_ text [TOOL and more. \n"
    choice = families[family].stub.Generate(ask(saying(family, text), tools=TOOLS), timeout=20).choices[0]
    assert (choice.message.content, len(choice.message.tool_calls)) == (text, 0)
    assert choice.finish_reason == generation_pb2.FINISH_REASON_STOP


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": message_pb2.ToolChoice(mode=MODE.MODE_NONE)}])
def test_without_tools_to_call_nothing_is_a_call(families: dict[str, GatewayThread], fields: dict[str, Any]) -> None:
    text = spell("qwen", "get_time", "{}")
    response = families["qwen"].stub.Generate(ask(saying("qwen", text), **fields), timeout=20)
    assert response.choices[0].message.content == text
    assert (
        response.usage.prompt_tokens
        == families["qwen"]
        .stub.CountTokens(chat_pb2.CountTokensRequest(messages=ask(saying("qwen", text)).messages), timeout=20)
        .prompt_tokens
    )


def test_a_call_that_is_cut_off_is_no_reason_to_call(families: dict[str, GatewayThread]) -> None:
    text = spell("qwen", "get_weather", BERN)
    cut = text.index("Bern") + 2
    request = ask(saying("qwen", text), tools=TOOLS, max_new_tokens=cut)
    choice = families["qwen"].stub.Generate(request, timeout=20).choices[0]
    assert choice.message.tool_calls[0].arguments == '{"city": "Be'
    assert choice.finish_reason == generation_pb2.FINISH_REASON_LENGTH
    choice = (
        families["qwen"]
        .stub.Generate(ask(saying("qwen", text), tools=TOOLS, stop_strings=["rn"]), timeout=20)
        .choices[0]
    )
    assert choice.message.tool_calls[0].arguments == '{"city": "Be'
    assert (choice.finish_reason, choice.stop_string) == (generation_pb2.FINISH_REASON_STOP, "rn")


def test_a_stop_string_after_a_call_leaves_it_complete(families: dict[str, GatewayThread]) -> None:
    text = spell("qwen", "get_time", "{}")
    request = ask(saying("qwen", text), tools=TOOLS, stop_strings=["</tool_call>"])
    choice = families["qwen"].stub.Generate(request, timeout=20).choices[0]
    assert (choice.message.content, choice.message.tool_calls[0].arguments) == ("", "{}")
    assert choice.finish_reason == generation_pb2.FINISH_REASON_TOOL_CALLS


def conversation(call_id: str) -> list[message_pb2.Message]:
    call = message_pb2.ToolCall(id=call_id, name="get_weather", arguments='{"city": "Bern"}')
    return [
        message_pb2.Message(role=message_pb2.ROLE_USER, content="Weather in Bern?"),
        message_pb2.Message(role=message_pb2.ROLE_ASSISTANT, tool_calls=[call]),
        message_pb2.Message(role=message_pb2.ROLE_TOOL, content="sunny", tool_call_id=call_id),
    ]


@pytest.mark.parametrize("family", ["qwen", "llama", "mistral", "mistral11"])
def test_the_next_turn_is_what_transformers_makes_of_it(
    families: dict[str, GatewayThread], tmp_path_factory: pytest.TempPathFactory, family: str
) -> None:
    stub = families[family].stub
    count = stub.CountTokens(chat_pb2.CountTokensRequest(messages=conversation("abcdefghi"), tools=TOOLS), timeout=20)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path_factory.getbasetemp() / family)
    call = {"name": "get_weather", "arguments": {"city": "Bern"}}
    no_arguments = {"type": "object", "properties": {}}
    ids = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "Weather in Bern?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "id": "abcdefghi", "function": call}],
            },
            {"role": "tool", "content": "sunny", "tool_call_id": "abcdefghi", "name": "get_weather"},
        ],
        tools=[
            {
                "type": "function",
                "function": {"name": "get_weather", "description": "Tells the weather.", "parameters": SCHEMA},
            },
            {"type": "function", "function": {"name": "get_time", "description": "", "parameters": no_arguments}},
        ],
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    assert count.prompt_tokens == len(ids)


def test_ids_differ_from_turn_to_turn_and_repeat_with_the_seed(families: dict[str, GatewayThread]) -> None:
    stub = families["qwen"].stub
    said = ask(saying("qwen", spell("qwen", "get_time", "{}"))).messages[0]

    def call_id(*earlier: message_pb2.Message) -> str:
        config = generation_pb2.GenerationConfig(seed=3)
        request = chat_pb2.GenerateRequest(messages=[*earlier, said], tools=TOOLS, generation_config=config)
        return str(stub.Generate(request, timeout=20).choices[0].message.tool_calls[0].id)

    first = call_id()
    assert first == call_id() != call_id(*conversation(first))


def test_a_template_may_refuse_what_it_cannot_write(families: dict[str, GatewayThread]) -> None:
    request = chat_pb2.GenerateRequest(messages=conversation("short"), tools=TOOLS)
    with pytest.raises(grpc.RpcError) as raised:
        families["mistral"].stub.Generate(request, timeout=20)
    assert violated_fields(raised.value) == ["messages"]
    assert "length 9" in raised.value.details()


@pytest.mark.parametrize("family", ["qwen", "mistral", "mistral11"])
def test_a_call_may_be_resumed_anywhere(families: dict[str, GatewayThread], family: str) -> None:
    stub = families[family].stub
    request = ask(saying(family, "So: " + spell(family, "get_time", '{"zone": "C"}')), tools=TOOLS, seed=5)
    responses = list(stub.GenerateStream(request, timeout=20))
    expected = whole(responses)
    for end in range(1, len(responses) + 1):
        resumed = chat_pb2.GenerateRequest()
        resumed.CopyFrom(request)
        resumed.resume.token_ids.extend(i for r in responses[:end] for i in r.token_ids)
        rest = list(stub.GenerateStream(resumed, timeout=20))
        assert whole([*responses[:end], *rest]) == expected
        assert rest[-1].finish_reason == generation_pb2.FINISH_REASON_TOOL_CALLS


def test_each_choice_has_calls_of_its_own(families: dict[str, GatewayThread]) -> None:
    request = ask(saying("qwen", spell("qwen", "get_time", "{}")), tools=TOOLS, num_return_sequences=2, do_sample=True)
    choices = families["qwen"].stub.Generate(request, timeout=20).choices
    assert [len(choice.message.tool_calls) for choice in choices] == [1, 1]
    assert choices[0].message.tool_calls[0].id != choices[1].message.tool_calls[0].id


def test_a_call_outlives_the_worker_that_began_it(families: dict[str, GatewayThread]) -> None:
    text = spell("qwen", "get_weather", BERN)
    stub = families["qwen"].stub
    expected = stub.Generate(ask(saying("qwen", text), tools=TOOLS, seed=5), timeout=20).choices[0].message
    broken = saying("qwen", f"!die-at {text.index('Bern') + 2} {text}")
    responses = list(stub.GenerateStream(ask(broken, tools=TOOLS, seed=5), timeout=60))
    assert whole(responses) == expected


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
def test_a_bad_tool_is_refused_by_name(
    families: dict[str, GatewayThread], tools: list[message_pb2.Tool], fields: list[str]
) -> None:
    messages = ask("x").messages
    for method, request in (
        (families["qwen"].stub.Generate, chat_pb2.GenerateRequest(messages=messages, tools=tools)),
        (families["qwen"].stub.CountTokens, chat_pb2.CountTokensRequest(messages=messages, tools=tools)),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            method(request, timeout=20)
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert violated_fields(raised.value) == fields


REQUIRED = message_pb2.ToolChoice(mode=MODE.MODE_REQUIRED)
JSON_OBJECT = generation_pb2.ResponseFormat(json_object=generation_pb2.JsonObjectFormat())
BAD_PATTERN = tool(parameters='{"properties": {"a": {"type": "string", "pattern": "("}}}')


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": [CLOCK, BAD_PATTERN], "tool_choice": REQUIRED}, "tools[1].parameters"),
        ({"tools": [CLOCK, BAD_PATTERN], "tool_choice": message_pb2.ToolChoice(name="f")}, "tools[1].parameters"),
        ({"tools": TOOLS, "tool_choice": REQUIRED, "response_format": JSON_OBJECT}, "response_format"),
        ({"tools": TOOLS, "tool_choice": REQUIRED, "resume": chat_pb2.Resume(token_ids=b"No")}, "resume.token_ids"),
        ({"tools": TOOLS, "tool_choice": message_pb2.ToolChoice(name="f")}, "tool_choice.name"),
        ({"tool_choice": REQUIRED}, "tool_choice.mode"),
    ],
)
def test_calls_can_only_be_demanded_where_they_can_be_made(
    families: dict[str, GatewayThread], fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        families["qwen"].stub.Generate(ask("x", **fields), timeout=60)
    assert violated_fields(raised.value) == [field]


@pytest.mark.parametrize("choice", [REQUIRED, message_pb2.ToolChoice(name="get_weather")])
@pytest.mark.parametrize("family", ["qwen", "mistral", "mistral11", "llama"])
def test_a_call_that_must_be_made_is_read_as_any_other(
    families: dict[str, GatewayThread], family: str, choice: message_pb2.ToolChoice
) -> None:
    request = ask(saying(family, spell(family, "get_weather", BERN)), tools=TOOLS, tool_choice=choice)
    answer = families[family].stub.Generate(request, timeout=60).choices[0]
    assert [call.arguments for call in answer.message.tool_calls] == [BERN]
    assert answer.finish_reason == generation_pb2.FINISH_REASON_TOOL_CALLS


def test_a_model_may_reason_before_the_call_that_it_must_make(families: dict[str, GatewayThread]) -> None:
    text = "Hm.\n</think>\n\n" + spell("qwen", "get_weather", '{"city": "Bern"}')
    request = ask(saying("qwen", text), tools=TOOLS, tool_choice=REQUIRED)
    message = families["opened with tools"].stub.Generate(request, timeout=60).choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm.", "")
    assert message.tool_calls[0].arguments == '{"city": "Bern"}'
    request.resume.token_ids.extend(text.encode())  # which the grammar must allow
    resumed = families["opened with tools"].stub.Generate(request, timeout=60).choices[0]
    assert resumed.finish_reason == generation_pb2.FINISH_REASON_TOOL_CALLS


def test_a_format_of_the_whole_answer_leaves_no_room_for_tools(families: dict[str, GatewayThread]) -> None:
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
def test_fields_of_messages_must_make_sense(
    families: dict[str, GatewayThread], message: dict[str, Any], field: str
) -> None:
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


def test_counting_with_tools_needs_them_supported_too(gateway: GatewayThread) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        gateway.stub.CountTokens(chat_pb2.CountTokensRequest(messages=ask("x").messages, tools=TOOLS), timeout=20)
    assert error_info_of(raised.value).metadata["field"] == "tools"


@pytest.mark.parametrize(
    ("family", "text"),
    [("thinking", "<think>\nLet me see.\n</think>\n\nYes."), ("opened", "Let me see.\n</think>\n\nYes.")],
)
def test_reasoning_comes_apart_from_content(families: dict[str, GatewayThread], family: str, text: str) -> None:
    request = ask(saying(family, text))
    message = families[family].stub.Generate(request, timeout=20).choices[0].message
    assert (message.reasoning_content, message.content) == ("Let me see.", "Yes.")
    assert whole(list(families[family].stub.GenerateStream(request, timeout=20))) == message


def test_reasoning_may_be_turned_off_by_the_template(families: dict[str, GatewayThread]) -> None:
    request = ask(saying("thinking", "Yes."))
    request.chat_template_kwargs.update({"enable_thinking": False})
    message = families["thinking"].stub.Generate(request, timeout=20).choices[0].message
    assert (message.reasoning_content, message.content) == ("", "Yes.")


def test_earlier_reasoning_is_the_templates_to_tell(families: dict[str, GatewayThread]) -> None:
    def count(family: str, reasoning: str) -> int:
        request = chat_pb2.CountTokensRequest(messages=ask("Why?", "So.", "Sure?").messages)
        request.messages[1].reasoning_content = reasoning
        return int(families[family].stub.CountTokens(request, timeout=20).prompt_tokens)

    assert count("thinking", "hmm") == count("thinking", "") + len("<think>\nhmm\n</think>\n\n")
    assert count("opened", "hmm") == count("opened", "")


@pytest.mark.parametrize(
    ("family", "expected"), [("qwen", {"tools"}), ("thinking", {"reasoning"}), ("chatml", {"tools"})]
)
def test_capabilities_tell(families: dict[str, GatewayThread], family: str, expected: set[str]) -> None:
    capabilities = families[family].stub.GetModel(chat_pb2.GetModelRequest(), timeout=20).capabilities
    assert {"tools", "reasoning"} & set(capabilities) == expected
