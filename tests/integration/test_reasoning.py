"""Reasoning over the wire: told apart from content, and given back to templates that take it."""

from __future__ import annotations

import grpc
import pytest

from parley.v1 import chat_pb2
from tests.support.requests import ask
from tests.support.tools import Families, saying, whole


@pytest.mark.parametrize(
    ("family", "text"),
    [("thinking", "<think>\nLet me see.\n</think>\n\nYes."), ("opened", "Let me see.\n</think>\n\nYes.")],
)
def test_reasoning_comes_apart_from_content(families: Families, family: str, text: str) -> None:
    request = ask(saying(family, text))
    message = families[family].stub.Generate(request, timeout=20).choices[0].message
    assert (message.reasoning_content, message.content) == ("Let me see.", "Yes.")
    assert whole(list(families[family].stub.GenerateStream(request, timeout=20))) == message


@pytest.mark.parametrize(
    ("begun", "text", "reasoning"),
    [("<think>\nI add", " four.\n</think>\n\n8", " four."), ("<think>hm</thi", "nk>8", "")],
)
def test_reasoning_goes_on_where_the_message_to_continue_ends(
    families: Families, begun: str, text: str, reasoning: str
) -> None:
    request = ask(saying("thinking", text), begun, continue_final_message=True)
    message = families["thinking"].stub.Generate(request, timeout=20).choices[0].message
    assert (message.reasoning_content, message.content) == (reasoning, "8")
    assert whole(list(families["thinking"].stub.GenerateStream(request, timeout=20))) == message


def test_reasoning_may_be_turned_off_by_the_template(families: Families) -> None:
    request = ask(saying("thinking", "Yes."))
    request.chat_template_kwargs.update({"enable_thinking": False})
    message = families["thinking"].stub.Generate(request, timeout=20).choices[0].message
    assert (message.reasoning_content, message.content) == ("", "Yes.")


@pytest.mark.parametrize(
    ("family", "messages", "why"),
    [
        ("thinking", ["Why?", "<think>hm"], "the message to continue ends amid its reasoning"),
        ("opened", ["Why?"], "the chat template has this model's answer begin with its reasoning"),
    ],
)
def test_no_form_fits_an_answer_that_begins_with_reasoning(
    families: Families, family: str, messages: list[str], why: str
) -> None:
    request = ask(*messages, response_format={"regex": "a"}, continue_final_message=len(messages) > 1)
    with pytest.raises(grpc.RpcError) as raised:
        families[family].stub.Generate(request, timeout=60)
    assert raised.value.details() == f"response_format: {why}"


def test_earlier_reasoning_is_the_templates_to_tell(families: Families) -> None:
    def count(family: str, reasoning: str) -> int:
        request = chat_pb2.CountTokensRequest(messages=ask("Why?", "So.", "Sure?").messages)
        request.messages[1].reasoning_content = reasoning
        return int(families[family].stub.CountTokens(request, timeout=20).prompt_tokens)

    assert count("thinking", "hmm") == count("thinking", "") + len("<think>\nhmm\n</think>\n\n")
    assert count("opened", "hmm") == count("opened", "")
