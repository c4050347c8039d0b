"""Tool calls over the wire: chat templates of several families, a worker that writes what it is told to."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from transformers import AutoTokenizer

from parley.v1 import chat_pb2, generation_pb2, message_pb2
from tests.support.requests import ask, violated_fields
from tests.support.tiny_tokenizer import NUM_BYTES
from tests.support.tools import BERN, MODE, REQUIRED, SCHEMA, TOOLS, Families, conversation, saying, spell, whole


@pytest.mark.parametrize("family", ["qwen", "llama", "mistral", "mistral11", "chatml"])
def test_a_call_arrives_as_one_whole_or_streamed(families: Families, family: str) -> None:
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
    # As they were made, however many tokens a busy machine has put into a message.
    num_made, arguments = -bytes(i for i in choice.token_ids if i < NUM_BYTES).index(BERN.encode()), ""
    for response in responses:
        num_made += sum(i < NUM_BYTES for i in response.token_ids)
        arguments += "".join(call.arguments for call in response.tool_calls)
        assert arguments == BERN[: max(num_made, 0)]


def test_several_calls_and_text_before_them(families: Families) -> None:
    text = "Both.\n\n" + spell("qwen", "get_weather", BERN) + "\n" + spell("qwen", "get_time", "{}")
    message = families["qwen"].stub.Generate(ask(saying("qwen", text), tools=TOOLS), timeout=20).choices[0].message
    assert message.content == "Both."
    assert [(call.name, call.arguments) for call in message.tool_calls] == [("get_weather", BERN), ("get_time", "{}")]
    assert len({call.id for call in message.tool_calls}) == 2


@pytest.mark.parametrize("family", ["qwen", "mistral", "mistral11"])
def test_text_without_calls_is_content(families: Families, family: str) -> None:
    text = "Plain <tool_ text [TOOL and more. \n"
    choice = families[family].stub.Generate(ask(saying(family, text), tools=TOOLS), timeout=20).choices[0]
    assert (choice.message.content, len(choice.message.tool_calls)) == (text, 0)
    assert choice.finish_reason == generation_pb2.FINISH_REASON_STOP


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": message_pb2.ToolChoice(mode=MODE.MODE_NONE)}])
def test_without_tools_to_call_nothing_is_a_call(families: Families, fields: dict[str, Any]) -> None:
    text = spell("qwen", "get_time", "{}")
    response = families["qwen"].stub.Generate(ask(saying("qwen", text), **fields), timeout=20)
    assert response.choices[0].message.content == text
    assert (
        response.usage.prompt_tokens
        == families["qwen"]
        .stub.CountTokens(chat_pb2.CountTokensRequest(messages=ask(saying("qwen", text)).messages), timeout=20)
        .prompt_tokens
    )


def test_a_call_that_is_cut_off_is_no_reason_to_call(families: Families) -> None:
    text = spell("qwen", "get_weather", BERN)
    cut = text.index("Bern") + 2
    request = ask(saying("qwen", text), tools=TOOLS, max_new_tokens=cut)
    choice = families["qwen"].stub.Generate(request, timeout=20).choices[0]
    assert choice.message.tool_calls[0].arguments == '{"city": "Be'
    assert choice.finish_reason == generation_pb2.FINISH_REASON_LENGTH
    request = ask(saying("qwen", text), tools=TOOLS, max_new_tokens=len(text) - 1)
    choice = families["qwen"].stub.Generate(request, timeout=20).choices[0]
    assert choice.message.tool_calls[0].arguments == BERN  # whole, but another call might have followed
    assert choice.finish_reason == generation_pb2.FINISH_REASON_LENGTH
    choice = (
        families["qwen"]
        .stub.Generate(ask(saying("qwen", text), tools=TOOLS, stop_strings=["rn"]), timeout=20)
        .choices[0]
    )
    assert choice.message.tool_calls[0].arguments == '{"city": "Be'
    assert (choice.finish_reason, choice.stop_string) == (generation_pb2.FINISH_REASON_STOP, "rn")


@pytest.mark.parametrize(
    ("arguments", "num_taken"),
    [
        ('{"a": [1e308, "\\ud83d\\ude00"]}', None),
        ('{"a": ' + 99 * "[" + 99 * "]" + "}", None),
        ('{"a": 1e999}', 11),
        ('{"a": "\\ud800"}', 13),
        ('{"a": ' + 100 * "[" + 100 * "]" + "}", 105),
    ],
)
@pytest.mark.parametrize("family", ["qwen", "mistral11"])
def test_a_call_is_complete_exactly_where_it_may_be_sent_back(
    families: Families, family: str, arguments: str, num_taken: int | None
) -> None:
    stub = families[family].stub
    request = ask(saying(family, spell(family, "get_weather", arguments)), tools=TOOLS)
    choice = stub.Generate(request, timeout=20).choices[0]
    [call] = choice.message.tool_calls
    assert call.arguments == arguments[:num_taken]
    assert choice.message.content.startswith("" if num_taken is None else arguments[num_taken:])
    is_complete = choice.finish_reason == generation_pb2.FINISH_REASON_TOOL_CALLS
    assert is_complete == (num_taken is None)

    call.arguments = arguments
    result = message_pb2.Message(role=message_pb2.ROLE_TOOL, content="sunny", tool_call_id=call.id)
    count = chat_pb2.CountTokensRequest(messages=[*request.messages, choice.message, result], tools=TOOLS)
    if is_complete:
        assert stub.CountTokens(count, timeout=20).prompt_tokens
    else:
        with pytest.raises(grpc.RpcError) as raised:
            stub.CountTokens(count, timeout=20)
        assert violated_fields(raised.value) == ["messages[1].tool_calls[0].arguments"]


def test_a_stop_string_after_a_call_leaves_it_complete(families: Families) -> None:
    text = spell("qwen", "get_time", "{}")
    request = ask(saying("qwen", text), tools=TOOLS, stop_strings=["</tool_call>"])
    choice = families["qwen"].stub.Generate(request, timeout=20).choices[0]
    assert (choice.message.content, choice.message.tool_calls[0].arguments) == ("", "{}")
    assert choice.finish_reason == generation_pb2.FINISH_REASON_TOOL_CALLS


@pytest.mark.parametrize("family", ["qwen", "llama", "mistral", "mistral11"])
def test_the_next_turn_is_what_transformers_makes_of_it(families: Families, family: str) -> None:
    stub = families[family].stub
    count = stub.CountTokens(chat_pb2.CountTokensRequest(messages=conversation("abcdefghi"), tools=TOOLS), timeout=20)
    tokenizer = AutoTokenizer.from_pretrained(families.folder / family)
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


def test_ids_differ_from_turn_to_turn_and_repeat_with_the_seed(families: Families) -> None:
    stub = families["qwen"].stub
    said = ask(saying("qwen", spell("qwen", "get_time", "{}"))).messages[0]

    def call_id(*earlier: message_pb2.Message) -> str:
        config = generation_pb2.GenerationConfig(seed=3)
        request = chat_pb2.GenerateRequest(messages=[*earlier, said], tools=TOOLS, generation_config=config)
        return str(stub.Generate(request, timeout=20).choices[0].message.tool_calls[0].id)

    first = call_id()
    assert first == call_id() != call_id(*conversation(first))


def test_ids_differ_from_those_of_earlier_calls_where_the_oldest_turn_was_left_out(families: Families) -> None:
    stub = families["qwen"].stub
    said = ask(saying("qwen", spell("qwen", "get_time", "{}") + "\n" + spell("qwen", "get_time", "{}"))).messages[0]

    def call_ids(*earlier: message_pb2.Message) -> list[str]:
        config = generation_pb2.GenerationConfig(seed=3)
        request = chat_pb2.GenerateRequest(messages=[*earlier, said], tools=TOOLS, generation_config=config)
        return [call.id for call in stub.Generate(request, timeout=20).choices[0].message.tool_calls]

    second = call_ids(*conversation("oldest000"))[0]
    ids = call_ids(*conversation(second))
    assert ids == call_ids(*conversation(second))
    assert len({second, *ids}) == 3


def test_a_template_may_refuse_what_it_cannot_write(families: Families) -> None:
    request = chat_pb2.GenerateRequest(messages=conversation("short"), tools=TOOLS)
    with pytest.raises(grpc.RpcError) as raised:
        families["mistral"].stub.Generate(request, timeout=20)
    assert violated_fields(raised.value) == ["messages"]
    assert "length 9" in raised.value.details()


@pytest.mark.parametrize("family", ["qwen", "mistral", "mistral11"])
def test_a_call_may_be_resumed_anywhere(families: Families, family: str) -> None:
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


def test_each_choice_has_calls_of_its_own(families: Families) -> None:
    request = ask(saying("qwen", spell("qwen", "get_time", "{}")), tools=TOOLS, num_return_sequences=2, do_sample=True)
    choices = families["qwen"].stub.Generate(request, timeout=20).choices
    assert [len(choice.message.tool_calls) for choice in choices] == [1, 1]
    assert choices[0].message.tool_calls[0].id != choices[1].message.tool_calls[0].id


def test_a_call_outlives_the_worker_that_began_it(families: Families) -> None:
    text = spell("qwen", "get_weather", BERN)
    stub = families["qwen"].stub
    expected = stub.Generate(ask(saying("qwen", text), tools=TOOLS, seed=5), timeout=20).choices[0].message
    broken = saying("qwen", f"!die-at {text.index('Bern') + 2} {text}")
    responses = list(stub.GenerateStream(ask(broken, tools=TOOLS, seed=5), timeout=60))
    assert whole(responses) == expected


@pytest.mark.parametrize("choice", [REQUIRED, message_pb2.ToolChoice(name="get_weather")])
@pytest.mark.parametrize("family", ["qwen", "mistral", "mistral11", "llama"])
def test_a_call_that_must_be_made_is_read_as_any_other(
    families: Families, family: str, choice: message_pb2.ToolChoice
) -> None:
    request = ask(saying(family, spell(family, "get_weather", BERN)), tools=TOOLS, tool_choice=choice)
    request.response_format.text.SetInParent()  # asks for nothing, and so does not stand in the way of a call
    answer = families[family].stub.Generate(request, timeout=60).choices[0]
    assert [call.arguments for call in answer.message.tool_calls] == [BERN]
    assert answer.finish_reason == generation_pb2.FINISH_REASON_TOOL_CALLS


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"tools": TOOLS, "tool_choice": REQUIRED}, "tools"),
        ({"response_format": generation_pb2.ResponseFormat(regex=".*")}, "response_format"),
    ],
)
def test_a_grammar_that_cannot_be_followed_further_names_what_it_is_made_of(
    families: Families, fields: dict[str, Any], path: str
) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        families["qwen"].stub.Generate(ask(saying("qwen", "!misfit"), **fields), timeout=60)
    assert violated_fields(raised.value) == [path]


def test_a_model_may_reason_before_the_call_that_it_must_make(families: Families) -> None:
    text = "Hm.\n</think>\n\n" + spell("qwen", "get_weather", '{"city": "Bern"}')
    request = ask(saying("qwen", text), tools=TOOLS, tool_choice=REQUIRED)
    message = families["opened with tools"].stub.Generate(request, timeout=60).choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm.", "")
    assert message.tool_calls[0].arguments == '{"city": "Bern"}'
    request.resume.token_ids.extend(text.encode())  # which the grammar must allow
    resumed = families["opened with tools"].stub.Generate(request, timeout=60).choices[0]
    assert resumed.finish_reason == generation_pb2.FINISH_REASON_TOOL_CALLS


def test_whether_reasoning_is_open_before_the_call_that_must_be_made_is_the_conversations_to_tell(
    families: Families,
) -> None:
    stub = families["opened but after results"].stub
    messages = conversation("abcdefghi")
    for answered, is_allowed in ((messages[:1], True), (messages, False)):
        request = chat_pb2.GenerateRequest(messages=answered, tools=TOOLS, tool_choice=REQUIRED)
        request.resume.token_ids.extend(b"Hm.\n</think>\n\n<tool_call>")
        if is_allowed:
            stub.Generate(request, timeout=60)
            continue
        with pytest.raises(grpc.RpcError) as raised:
            stub.Generate(request, timeout=60)
        assert violated_fields(raised.value) == ["resume.token_ids"]


@pytest.mark.parametrize(
    ("family", "expected"), [("qwen", {"tools"}), ("thinking", {"reasoning"}), ("chatml", {"tools"})]
)
def test_capabilities_tell(families: Families, family: str, expected: set[str]) -> None:
    capabilities = families[family].stub.GetModel(chat_pb2.GetModelRequest(), timeout=20).capabilities
    assert {"tools", "reasoning"} & set(capabilities) == expected
