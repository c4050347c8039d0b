"""How Python arguments become requests."""

from __future__ import annotations

import re

import pytest

from parley.v1 import chat_pb2, generation_pb2, message_pb2
from parley_client import ChatOptions, GenerationOptions, InvalidRequest, Message, Reply, Tool, assistant, request, user

QUESTION = [user("Hi")]
LOOP: dict[str, object] = {}
LOOP["again"] = LOOP


def build(**options):
    return request.generate("chat", QUESTION, options)


def test_the_options_are_the_fields_of_the_contract():
    assert set(GenerationOptions.__annotations__) == set(generation_pb2.GenerationConfig.DESCRIPTOR.fields_by_name)


class Person:
    """As a pydantic model tells its schema."""

    @classmethod
    def model_json_schema(cls):
        return {"title": cls.__name__}


@pytest.mark.parametrize("field", list(generation_pb2.GenerationConfig.DESCRIPTOR.fields), ids=lambda field: field.name)
def test_each_generation_option_sets_its_field_and_only_it(field):
    samples = {"stop_strings": ["a", "b"], "stop_token_ids": [0, 7], "logit_bias": {3: -1.0}}
    # Zero and false must arrive as such: they are not "unset".
    value = samples.get(field.name, type(field.default_value)())
    config = build(**{field.name: value}).generation_config
    [(only, sent)] = config.ListFields()
    assert only.name == field.name
    assert sent == value


def test_options_left_out_or_none_stay_unset():
    assert build(**dict.fromkeys(ChatOptions.__annotations__)) == build()
    assert not build().generation_config.ListFields()


def test_a_lone_stop_string_is_not_taken_apart():
    assert build(stop_strings="END").generation_config.stop_strings == ["END"]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_new_tokens": -1}, "generation_config.max_new_tokens"),
        ({"max_new_tokens": 2**32}, "generation_config.max_new_tokens"),
        ({"seed": 2**64}, "generation_config.seed"),
        ({"temperature": "hot"}, "generation_config.temperature"),
        ({"stop_strings": ["a", "\ud800"]}, "generation_config.stop_strings[1]"),
        ({"stop_token_ids": [1, 2, -3]}, "generation_config.stop_token_ids[2]"),
        ({"logit_bias": {1: 0.0, -2: 0.0}}, "generation_config.logit_bias[-2]"),
        ({"model": "\ud800"}, "model"),
        ({"request_id": "\ud800"}, "request_id"),
        ({"priority": 2**31}, "priority"),
        ({"chat_template_kwargs": {"good": 1, "bad": object()}}, "chat_template_kwargs['bad']"),
        ({"tools": [{"name": "a"}, {"name": "\ud800"}]}, "tools[1].name"),
        ({"tools": [{"type": "function", "function": {"name": 3}}]}, "tools[0].function.name"),
        ({"tools": [{"name": "a", "strict": True}]}, "tools[0].strict"),
        ({"tool_choice": "\ud800"}, "tool_choice.name"),
        ({"response_format": "xml"}, "response_format"),
        ({"response_format": {}}, "response_format"),
        ({"response_format": {"regex": "a", "grammar": "b"}}, "response_format"),
        ({"response_format": {"regex": "\ud800"}}, "response_format.regex"),
        ({"response_format": {"choice": ["a", "\ud800"]}}, "response_format.choice.choices[1]"),
        ({"response_format": {"choice": "yes"}}, "response_format.choice.choices"),
        ({"response_format": ["a", "b"]}, "response_format"),
        ({"response_format": {"json_schema": {"type": str}}}, "response_format.json_schema"),
        ({"response_format": {"json_schema": {"const": "\ud800"}}}, "response_format.json_schema"),
        ({"tools": "weather"}, "tools"),
        ({"tools": ["weather"]}, "tools[0]"),
        ({"tools": [{"name": "a", "parameters": {"type": str}}]}, "tools[0].parameters"),
        ({"tool_choice": {"type": "function", "function": {"name": "a"}}}, "tool_choice.name"),
        ({"logit_bias": [1]}, "generation_config.logit_bias"),
        ({"stop_token_ids": 5}, "generation_config.stop_token_ids"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {1: "x"}}, "chat_template_kwargs[1]"),
        ({"chat_template_kwargs": {"a": LOOP}}, "chat_template_kwargs['a']"),
        ({"response_format": {"json_schema": LOOP}}, "response_format.json_schema"),
        ({"resume": 5}, "resume.token_ids"),
    ],
)
def test_values_that_do_not_fit_are_refused_with_the_field(options, field):
    with pytest.raises(InvalidRequest) as caught:
        build(**options)
    assert [violation.field for violation in caught.value.violations] == [field]
    assert "built-in" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (user(None), "messages[0].content: must be text, not NoneType"),
        (assistant("", tool_calls=[{"name": "a"}]), "messages[0].tool_calls[0]: must be a ToolCall, not dict"),
        (Message("narrator", "Once"), 'messages[0].role: unknown enum label "ROLE_NARRATOR"'),
        (Message(5, "Once"), 'messages[0].role: unknown enum label "ROLE_5"'),
    ],
)
def test_what_stands_in_a_message_and_does_not_belong_there_is_named(message, said):
    with pytest.raises(InvalidRequest, match=re.escape(said)):
        request.generate("chat", [message], {})


def test_unknown_options_are_type_errors_that_name_them():
    with pytest.raises(TypeError, match=r"chat\(\) got an unexpected keyword argument 'max_length'"):
        build(max_length=5)


@pytest.mark.parametrize("messages", ["Hi", user("Hi"), message_pb2.Message(), 5, None])
def test_one_message_is_not_a_conversation(messages):
    with pytest.raises(TypeError, match="expected a sequence of messages"):
        request.generate("chat", messages, {})


def test_what_is_no_message_is_a_type_error_that_names_its_place():
    with pytest.raises(TypeError, match=r"messages\[1\]: expected a message such as user\('Hello'\), not str"):
        request.generate("chat", [user("Hi"), "there"], {})


def test_replies_and_protobuf_messages_stand_for_messages():
    said = message_pb2.Message(role=message_pb2.ROLE_ASSISTANT, content="Hello")
    reply = Reply(chat_pb2.GenerateResponse(choices=[chat_pb2.Choice(message=said)]))
    sent = request.generate("chat", [user("Hi"), reply, reply.message, said, assistant("Hello")], {}).messages
    assert list(sent[1:]) == [said] * 4


WEATHER = {"name": "weather", "description": "Tells it.", "parameters": {"type": "object"}}


@pytest.mark.parametrize(
    "tool",
    [
        WEATHER,
        Tool(**WEATHER),
        {**WEATHER, "parameters": '{"type": "object"}'},
        {"type": "function", "function": WEATHER},
        message_pb2.Tool(name="weather", description="Tells it.", parameters='{"type": "object"}'),
    ],
)
def test_tools_may_be_written_in_the_usual_ways(tool):
    expected = message_pb2.Tool(name="weather", description="Tells it.", parameters='{"type": "object"}')
    assert list(build(tools=[tool]).tools) == [expected]
    assert list(request.count_tokens(QUESTION, None, [tool], None, None).tools) == [expected]
    assert list(build(tools=[Tool("now")]).tools) == [message_pb2.Tool(name="now")]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", message_pb2.ToolChoice(mode="MODE_AUTO")),
        ("none", message_pb2.ToolChoice(mode="MODE_NONE")),
        ("required", message_pb2.ToolChoice(mode="MODE_REQUIRED")),
        ("weather", message_pb2.ToolChoice(name="weather")),
        (message_pb2.ToolChoice(name="auto"), message_pb2.ToolChoice(name="auto")),
    ],
)
def test_tool_choice_is_a_mode_or_a_tools_name(choice, expected):
    assert build(tool_choice=choice).tool_choice == expected


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("text", generation_pb2.ResponseFormat(text={})),
        ("json_object", generation_pb2.ResponseFormat(json_object={})),
        ({"json_schema": {"type": "object"}}, generation_pb2.ResponseFormat(json_schema='{"type": "object"}')),
        ({"json_schema": {"const": "天气"}}, generation_pb2.ResponseFormat(json_schema='{"const": "天气"}')),
        ({"json_schema": '{"type":"object"}'}, generation_pb2.ResponseFormat(json_schema='{"type":"object"}')),
        ({"json_schema": True}, generation_pb2.ResponseFormat(json_schema="true")),
        ({"json_schema": Person}, generation_pb2.ResponseFormat(json_schema='{"title": "Person"}')),
        (Person, generation_pb2.ResponseFormat(json_schema='{"title": "Person"}')),
        ({"regex": "[0-9]+"}, generation_pb2.ResponseFormat(regex="[0-9]+")),
        ({"grammar": 'root ::= "a"'}, generation_pb2.ResponseFormat(grammar='root ::= "a"')),
        ({"choice": ["yes", "no"]}, generation_pb2.ResponseFormat(choice={"choices": ["yes", "no"]})),
        ({"choice": []}, generation_pb2.ResponseFormat(choice={})),
        (generation_pb2.ResponseFormat(regex="a"), generation_pb2.ResponseFormat(regex="a")),
    ],
)
def test_every_response_format_can_be_asked_for(form, expected):
    sent = build(response_format=form).response_format
    assert sent == expected
    assert sent.WhichOneof("format") == expected.WhichOneof("format")
