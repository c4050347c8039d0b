"""`response_format` over gRPC with the real model, under both engines."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from parley.v1 import chat_pb2, generation_pb2
from tests.support.requests import ask
from tests.support.served import ServedProcess

STOP, LENGTH = generation_pb2.FINISH_REASON_STOP, generation_pb2.FINISH_REASON_LENGTH
QUESTION = "Tell me about Ann, who is 30."
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "nick": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-z]{2,6}$"}]},
    },
    "required": ["name", "age", "nick"],
    "additionalProperties": False,
}


def answer(served: ServedProcess, form: dict[str, Any], **fields: Any) -> chat_pb2.GenerateResponse:
    request = ask(QUESTION, response_format=form, **{"max_new_tokens": 80, **fields})
    return served.stub.Generate(request, timeout=120)


@pytest.mark.parametrize("sampling", [{}, {"seed": 7, "temperature": 1.5}])
def test_a_schemas_answer_is_valid(served: ServedProcess, sampling: dict[str, Any]) -> None:
    choice = answer(served, {"json_schema": json.dumps(PERSON)}, **sampling).choices[0]
    assert choice.finish_reason == STOP
    assert Draft202012Validator(PERSON).is_valid(json.loads(choice.message.content))


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[A-Z][a-z]{2,8} is [0-9]{1,3}\\."}, "[A-Z][a-z]{2,8} is [0-9]{1,3}\\."),
        ({"choice": {"choices": ["a child", "an adult", "日本"]}}, "a child|an adult|日本"),
        ({"grammar": 'root ::= "Ann is " ("young" | "old") tail\ntail ::= "!" | "."'}, "Ann is (young|old)[!.]"),
    ],
)
def test_other_formats_are_followed_as_a_whole(served: ServedProcess, form: dict[str, Any], pattern: str) -> None:
    choice = answer(served, form).choices[0]
    assert choice.finish_reason == STOP
    assert re.fullmatch(pattern, choice.message.content)


def test_a_json_object_is_one(served: ServedProcess) -> None:
    choice = answer(served, {"json_object": {}}, max_new_tokens=60).choices[0]
    assert choice.message.content.startswith("{")
    if choice.finish_reason == STOP:
        assert isinstance(json.loads(choice.message.content), dict)


def test_a_stream_is_the_same_answer_and_may_be_resumed_at_any_id(served: ServedProcess) -> None:
    form = {"json_schema": json.dumps(PERSON)}
    whole = answer(served, form, do_sample=False).choices[0]
    request = ask(QUESTION, response_format=form, max_new_tokens=80, do_sample=False)
    deltas = list(served.stub.GenerateStream(request, timeout=120))
    assert "".join(delta.content for delta in deltas) == whole.message.content
    ids = list(whole.token_ids)
    for cut in (1, len(ids) // 2, len(ids) - 1, len(ids)):
        rest = answer(served, form, do_sample=False, resume={"token_ids": ids[:cut]}).choices[0]
        assert [*ids[:cut], *rest.token_ids] == ids
        assert rest.finish_reason == STOP


def test_each_of_several_choices_follows_its_own_copy(served: ServedProcess) -> None:
    response = answer(served, {"regex": "[a-z]{3,9}"}, num_return_sequences=3, seed=5, temperature=2.0, logprobs=True)
    texts = [choice.message.content for choice in response.choices]
    assert all(re.fullmatch("[a-z]{3,9}", text) for text in texts)
    assert len(set(texts)) > 1
    assert all(len(choice.logprobs) == len(choice.token_ids) for choice in response.choices)


def test_special_tokens_stay_out_of_the_text_unless_asked_for(served: ServedProcess) -> None:
    form = {"choice": {"choices": ["yes"]}}
    assert answer(served, form).choices[0].message.content == "yes"
    shown = answer(served, form, skip_special_tokens=False, ignore_eos=True).choices[0]
    assert (shown.message.content, shown.finish_reason) == ("yes<|im_end|>", STOP)


def test_length_and_stop_strings_may_cut_a_form_short(served: ServedProcess) -> None:
    short = answer(served, {"regex": "x{50}"}, max_new_tokens=3).choices[0]
    assert (len(short.token_ids), short.finish_reason) == (3, LENGTH)
    stopped = answer(served, {"choice": {"choices": ["one;two"]}}, stop_strings=[";"]).choices[0]
    assert (stopped.message.content, stopped.stop_string, stopped.finish_reason) == ("one", ";", STOP)
