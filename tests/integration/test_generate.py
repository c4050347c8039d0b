"""Answers over the wire: text, ids, finish reasons, usage, timings, request ids."""

from __future__ import annotations

from typing import Any

import pytest

from parley.v1 import chat_pb2, generation_pb2, message_pb2
from tests.integration.conftest import StartGateway
from tests.support import tiny_tokenizer
from tests.support.gateway import GatewayThread
from tests.support.requests import ask

STOP, LENGTH = generation_pb2.FINISH_REASON_STOP, generation_pb2.FINISH_REASON_LENGTH
TEXTS = ["plain", "naïve café", "家族 👨‍👩‍👧‍👦 and 🏳️‍🌈", "e\u0301 and \u0928\u093f", "NUL \x00 is text", ""]


def stream(gateway: GatewayThread, request: chat_pb2.GenerateRequest) -> list[chat_pb2.GenerateStreamResponse]:
    return list(gateway.stub.GenerateStream(request, timeout=20))


@pytest.mark.parametrize("text", TEXTS)
def test_the_answer_is_the_models_text_and_ids(gateway: GatewayThread, text: str) -> None:
    response = gateway.stub.Generate(ask(text), timeout=20)
    (choice,) = response.choices
    assert choice.message == message_pb2.Message(role=message_pb2.ROLE_ASSISTANT, content=text)
    assert list(choice.token_ids) == [*text.encode(), tiny_tokenizer.IM_END_ID]
    assert choice.finish_reason == STOP
    assert choice.stop_string == ""
    assert response.usage.completion_tokens == len(choice.token_ids)


@pytest.mark.parametrize("text", TEXTS)
def test_stream_deltas_concatenate_to_the_unary_answer(gateway: GatewayThread, text: str) -> None:
    responses = stream(gateway, ask(text))
    unary = gateway.stub.Generate(ask(text), timeout=20)
    assert "".join(r.content for r in responses) == unary.choices[0].message.content
    assert [i for r in responses for i in r.token_ids] == list(unary.choices[0].token_ids)
    assert all("\ufffd" not in r.content for r in responses)
    assert [r.finish_reason for r in responses][:-1] == [0] * (len(responses) - 1)
    assert responses[-1].finish_reason == STOP
    assert responses[-1].usage == unary.usage


@pytest.mark.parametrize("stops", [[], ["house"]])
def test_with_an_interval_messages_have_more_tokens_and_streams_the_same(
    start_gateway: StartGateway, stops: list[str]
) -> None:
    gateway = start_gateway(worker=("--step-delay", "0.002"), stream_interval=4)
    # Of the ids that come with the last of the stop string, one is behind it.
    request = ask("A sentence that is long enough for the house, and more.", stop_strings=stops)
    responses = stream(gateway, request)
    unary = gateway.stub.Generate(request, timeout=20)
    assert all(len(r.token_ids) >= 4 for r in responses[1:-1])
    assert "".join(r.content for r in responses) == unary.choices[0].message.content
    assert [i for r in responses for i in r.token_ids] == list(unary.choices[0].token_ids)
    assert responses[-1].usage == unary.usage


def test_only_the_first_message_names_the_request_and_only_the_last_tells_usage(gateway: GatewayThread) -> None:
    responses = stream(gateway, ask("abcdef", request_id="my-id", seed=7))
    assert (responses[0].request_id, responses[0].model, responses[0].seed) == ("my-id", "scripted", 7)
    assert all(not (r.request_id or r.model or r.seed) for r in responses[1:])
    assert all(not (r.HasField("usage") or r.HasField("timings")) for r in responses[:-1])
    assert responses[-1].HasField("timings")


def test_usage_counts_the_prompt_after_the_chat_template(gateway: GatewayThread) -> None:
    request = ask("hi", system="be brief")
    prompt = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    expected = len(prompt) - 3 * len("<|im_start|>") - 2 * len("<|im_end|>") + 5
    assert gateway.stub.Generate(request, timeout=20).usage.prompt_tokens == expected
    count = chat_pb2.CountTokensRequest(messages=request.messages)
    assert gateway.stub.CountTokens(count, timeout=20).prompt_tokens == expected


def test_the_models_default_system_prompt_is_part_of_the_prompt(gateway: GatewayThread) -> None:
    without = gateway.stub.CountTokens(chat_pb2.CountTokensRequest(messages=ask("hi").messages), timeout=20)
    spelt_out = ask("hi", system=tiny_tokenizer.DEFAULT_SYSTEM_PROMPT)
    assert without == gateway.stub.CountTokens(chat_pb2.CountTokensRequest(messages=spelt_out.messages), timeout=20)


def test_count_tokens_counts_prompts_beyond_the_context(gateway: GatewayThread) -> None:
    request = chat_pb2.CountTokensRequest(messages=ask("x" * 10_000).messages)
    assert gateway.stub.CountTokens(request, timeout=20).prompt_tokens > 10_000


@pytest.mark.parametrize("fields", [{}, {"num_return_sequences": 3, "do_sample": True}])
def test_timings_are_in_order(gateway: GatewayThread, fields: dict[str, Any]) -> None:
    timings = gateway.stub.Generate(ask("hello", **fields), timeout=20).timings
    queue, first, total = (d.ToTimedelta() for d in (timings.queue, timings.time_to_first_token, timings.total))
    assert 0 < queue.total_seconds() <= first.total_seconds() <= total.total_seconds() < 20


def test_max_new_tokens_ends_with_length_and_never_sends_half_a_character(gateway: GatewayThread) -> None:
    for limit in range(1, 10):
        (choice,) = gateway.stub.Generate(ask("ab😀cd", max_new_tokens=limit), timeout=20).choices
        expected = "ab😀cd".encode()[:limit].decode(errors="ignore")
        assert (choice.message.content, len(choice.token_ids)) == (expected, min(limit, 9))
        assert choice.finish_reason == (LENGTH if limit < 9 else STOP)


def test_an_answer_runs_to_the_end_of_the_context(gateway: GatewayThread) -> None:
    response = gateway.stub.Generate(ask("!forever", max_new_tokens=4096), timeout=30)
    assert response.usage.prompt_tokens + response.usage.completion_tokens == 4096
    assert response.choices[0].finish_reason == LENGTH


@pytest.mark.parametrize(
    ("text", "stops", "content", "stop_string"),
    [
        ("hello world", ["o w"], "hell", "o w"),
        ("hello world", ["xyz", "world", "wor"], "hello ", "wor"),
        ("hello world", ["hello world!"], "hello world", ""),
        ("ab😀cd", ["😀"], "ab", "😀"),
        ("aaab", ["aab"], "a", "aab"),
        ("abc", ["c", "bc"], "a", "bc"),
    ],
)
def test_nothing_of_or_past_a_stop_string_is_sent(
    gateway: GatewayThread, text: str, stops: list[str], content: str, stop_string: str
) -> None:
    request = ask(text, stop_strings=stops)
    (choice,) = gateway.stub.Generate(request, timeout=20).choices
    assert (choice.message.content, choice.stop_string, choice.finish_reason) == (content, stop_string, STOP)
    responses = stream(gateway, request)
    assert "".join(r.content for r in responses) == content
    assert responses[-1].stop_string == stop_string
    if stop_string:
        assert bytes(choice.token_ids).decode().endswith(stop_string)  # its ids stay


def test_the_models_own_stop_strings_end_an_answer_unless_the_request_brings_others(
    start_gateway: StartGateway,
) -> None:
    own = start_gateway(worker=("--stop-string", "wor"))
    defaults = own.stub.GetModel(chat_pb2.GetModelRequest(), timeout=20).default_generation_config
    assert list(defaults.stop_strings) == ["wor"]
    (choice,) = own.stub.Generate(ask("hello world"), timeout=20).choices
    assert (choice.message.content, choice.stop_string) == ("hello ", "wor")
    (choice,) = own.stub.Generate(ask("hello world", stop_strings=["ld"]), timeout=20).choices
    assert (choice.message.content, choice.stop_string) == ("hello wor", "ld")


def test_a_stop_string_can_be_kept(gateway: GatewayThread) -> None:
    (choice,) = gateway.stub.Generate(
        ask("hello world", stop_strings=["o w"], include_stop_string=True), timeout=20
    ).choices
    assert (choice.message.content, choice.stop_string) == ("hello w", "o w")


def test_text_made_before_min_new_tokens_is_not_searched_for_stop_strings(gateway: GatewayThread) -> None:
    (choice,) = gateway.stub.Generate(ask("stop and stop", stop_strings=["stop"], min_new_tokens=2), timeout=20).choices
    assert choice.message.content == "stop and "


def test_a_stop_id_ends_the_answer_and_its_text_is_left_out(gateway: GatewayThread) -> None:
    (choice,) = gateway.stub.Generate(ask("hello", stop_token_ids=[ord("o")]), timeout=20).choices
    assert (choice.message.content, choice.token_ids[-1], choice.finish_reason) == ("hell", ord("o"), STOP)


def test_special_tokens_can_be_kept(gateway: GatewayThread) -> None:
    (choice,) = gateway.stub.Generate(ask("hello", skip_special_tokens=False), timeout=20).choices
    assert choice.message.content == "hello<|im_end|>"


def test_a_stop_ids_text_is_kept_with_special_tokens(gateway: GatewayThread) -> None:
    request = ask("hello", stop_token_ids=[ord("l")], skip_special_tokens=False)
    (choice,) = gateway.stub.Generate(request, timeout=20).choices
    assert choice.message.content == "hel"


def test_ignore_eos_goes_past_the_end_token(gateway: GatewayThread) -> None:
    (choice,) = gateway.stub.Generate(ask("hi", ignore_eos=True, max_new_tokens=5), timeout=20).choices
    assert list(choice.token_ids) == [*b"hi", *[tiny_tokenizer.IM_END_ID] * 3]
    assert (choice.message.content, choice.finish_reason) == ("hi", LENGTH)


def test_continue_final_message_answers_with_the_continuation_only(gateway: GatewayThread) -> None:
    request = ask("say abc", "abc", continue_final_message=True)
    (choice,) = gateway.stub.Generate(request, timeout=20).choices
    assert choice.message.content == "abc"  # the script repeats the last message
    longer = gateway.stub.Generate(ask("say abc", "abc"), timeout=20).usage.prompt_tokens
    assert longer > gateway.stub.Generate(request, timeout=20).usage.prompt_tokens


def test_a_seed_is_drawn_and_told_when_none_is_given(gateway: GatewayThread) -> None:
    seeds = {gateway.stub.Generate(ask("x"), timeout=20).seed for _ in range(3)}
    assert len(seeds) == 3


def test_headers_carry_the_request_id(gateway: GatewayThread) -> None:
    _, call = gateway.stub.Generate.with_call(ask("x", request_id="abc:1.2_3-4"), timeout=20)
    assert dict(call.initial_metadata())["x-request-id"] == "abc:1.2_3-4"
    _, call = gateway.stub.Generate.with_call(ask("x"), timeout=20, metadata=[("x-request-id", "from-metadata")])
    assert dict(call.initial_metadata())["x-request-id"] == "from-metadata"
    response, call = gateway.stub.Generate.with_call(ask("x"), timeout=20, metadata=[("x-request-id", "not valid!")])
    assert dict(call.initial_metadata())["x-request-id"] == response.request_id != "not valid!"


def test_two_clients_at_once_get_their_own_answers(gateway: GatewayThread) -> None:
    texts = [f"client {i} " * 20 for i in range(6)]
    futures = [gateway.stub.Generate.future(ask(text), timeout=30) for text in texts]
    assert [future.result().choices[0].message.content for future in futures] == texts


def test_get_model_tells_limits_and_defaults(gateway: GatewayThread) -> None:
    model = gateway.stub.GetModel(chat_pb2.GetModelRequest(), timeout=20)
    assert (model.model, model.max_context_tokens, model.vocab_size) == ("scripted", 4096, 259)
    assert (model.engine, model.dtype, model.device) == ("scripted", "float32", "cpu")
    defaults = model.default_generation_config
    assert (defaults.max_new_tokens, defaults.temperature, defaults.top_p) == (512, 0.5, 1.0)
    assert defaults.HasField("top_k")
    assert {
        "chat", "stream", "batch", "count_tokens", "continue_final_message", "stop_strings", "seed", "penalties",
        "logit_bias", "logprobs", "num_return_sequences", "resume",
    } <= set(model.capabilities)  # fmt: skip
