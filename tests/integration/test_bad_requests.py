"""Bad input: a clear status with details, and the next good request succeeds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct
from tokenizers import Tokenizer

from parley.v1 import chat_pb2, generation_pb2, message_pb2
from parleyd.config import ModelSettings
from tests.integration.conftest import StartGateway, assert_answers
from tests.support.gateway import GatewayThread, scripted_command, scripted_settings
from tests.support.raw_http2 import RawConnection
from tests.support.requests import ask, error_info_of, reason_of, violated_fields, violations_of
from tests.support.tiny_tokenizer import write_tiny_tokenizer

INVALID = grpc.StatusCode.INVALID_ARGUMENT

pytestmark = pytest.mark.usefixtures("the_next_good_request_succeeds")


def refusal(gateway: GatewayThread, request: chat_pb2.GenerateRequest) -> grpc.RpcError:
    """The error of a request, which unary and stream must share."""
    with pytest.raises(grpc.RpcError) as unary:
        gateway.stub.Generate(request, timeout=20)
    with pytest.raises(grpc.RpcError) as stream:
        list(gateway.stub.GenerateStream(request, timeout=20))
    assert unary.value.code() == stream.value.code()
    assert reason_of(unary.value) == reason_of(stream.value)
    return unary.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1), ("temperature", math.nan), ("temperature", 1e30), ("temperature", math.inf),
        ("top_p", 0), ("top_p", 1.5), ("top_p", math.nan), ("min_p", -0.1), ("min_p", 1.1),
        ("max_new_tokens", 0), ("max_new_tokens", 10**9), ("max_new_tokens", 4097), ("min_new_tokens", 513),
        ("repetition_penalty", 0), ("repetition_penalty", 11), ("presence_penalty", 2.5), ("frequency_penalty", -2.5),
        ("num_return_sequences", 0), ("num_return_sequences", 17), ("top_logprobs", 21),
        ("stop_strings", ["x"] * 17), ("stop_token_ids", [1] * 65),
    ],
)  # fmt: skip
def test_a_field_out_of_range_is_named(gateway: GatewayThread, field: str, value: Any) -> None:
    error = refusal(gateway, ask("x", **{field: value}))
    assert (error.code(), reason_of(error)) == (INVALID, "INVALID_REQUEST")
    assert violated_fields(error)[0] == f"generation_config.{field}"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"top_p": 1.0000001}, "top_p: must be above 0 to 1, not 1.00000012"),
        ({"temperature": 10.1}, "temperature: must be 0 to 10, not 10.1"),
        ({"temperature": 3.4e38}, "temperature: must be 0 to 10, not 3.4e+38"),
        ({"min_p": math.nan}, "min_p: must be 0 to 1, not nan"),
        ({"max_new_tokens": 2**32 - 1}, "max_new_tokens: must be 1 to 4096, not 4294967295"),
        ({"logit_bias": {7: 100.00001}}, "logit_bias[7]: must be -100 to 100, not 100.000008"),
        ({"stop_token_ids": [259]}, "stop_token_ids[0]: must be below 259, not 259"),
    ],
)
def test_a_number_out_of_range_is_told_as_it_was_sent(
    gateway: GatewayThread, fields: dict[str, Any], text: str
) -> None:
    assert refusal(gateway, ask("x", **fields)).details() == f"invalid request: generation_config.{text}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinities_are_named_wherever_a_number_may_have_a_fraction(
    gateway: GatewayThread, value: float
) -> None:
    fields = generation_pb2.GenerationConfig.DESCRIPTOR.fields
    names = [field.name for field in fields if field.type == field.TYPE_FLOAT]
    assert len(names) == 6
    error = refusal(gateway, ask("x", logit_bias={7: value}, **dict.fromkeys(names, value)))
    assert set(violated_fields(error)) == {f"generation_config.{name}" for name in (*names, "logit_bias[7]")}


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"logit_bias": {7: 100.5}}, "generation_config.logit_bias[7]"),
        ({"logit_bias": {259: 1.0}}, "generation_config.logit_bias[259]"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "generation_config.logit_bias"),
        ({"stop_strings": ["x" * 257]}, "generation_config.stop_strings[0]"),
        ({"resume": chat_pb2.Resume(token_ids=[1, 259])}, "resume.token_ids[1]"),
        ({"request_id": "x" * 129}, "request_id"),
    ],
)
def test_an_item_that_may_not_be_there_is_named(gateway: GatewayThread, fields: dict[str, Any], path: str) -> None:
    error = refusal(gateway, ask("x", **fields))
    assert (error.code(), violated_fields(error)) == (INVALID, [path])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0), ("temperature", 10), ("top_p", 1), ("top_p", 1e-6), ("top_k", 0), ("top_k", 10**6),
        ("min_p", 1), ("max_new_tokens", 1), ("max_new_tokens", 4096), ("min_new_tokens", 0),
        ("repetition_penalty", 10),
        ("seed", 2**64 - 1), ("presence_penalty", 0), ("logprobs", False), ("num_return_sequences", 1),
        ("stop_strings", ["x" * 256] * 16), ("stop_token_ids", [258] * 64), ("min_new_tokens", 512),
        ("presence_penalty", -2), ("frequency_penalty", 2), ("logit_bias", {0: -100.0, 258: 100.0}),
        ("top_logprobs", 20), ("request_id", "x" * 128),
    ],
)  # fmt: skip
def test_the_ends_of_the_ranges_are_accepted(gateway: GatewayThread, field: str, value: Any) -> None:
    assert gateway.stub.Generate(ask("y", **{field: value}), timeout=20).choices


def test_every_violation_is_reported_at_once(gateway: GatewayThread) -> None:
    request = ask(
        "x", temperature=-1, top_p=2, stop_strings=["ok", ""], stop_token_ids=[5, 259], request_id="not valid"
    )
    request.messages.add(content="no role")
    request.messages.add(role=99)  # type: ignore[arg-type]
    assert violated_fields(refusal(gateway, request)) == [
        "messages[1].role", "messages[2].role", "generation_config.temperature", "generation_config.top_p",
        "generation_config.stop_strings[1]", "generation_config.stop_token_ids[1]", "request_id",
    ]  # fmt: skip


@pytest.mark.parametrize("number", [0, 4097])
def test_no_messages_and_too_many_are_refused(gateway: GatewayThread, number: int) -> None:
    error = refusal(gateway, chat_pb2.GenerateRequest(messages=[message_pb2.Message()] * number))
    assert (error.code(), violated_fields(error)) == (INVALID, ["messages"])


def test_many_violations_fit_into_the_trailers(gateway: GatewayThread) -> None:
    request = chat_pb2.GenerateRequest(messages=[message_pb2.Message(content="数" * 10)] * 3000)
    error = refusal(gateway, request)
    fields = violated_fields(error)
    assert fields[0] == "messages[0].role"
    assert len(fields) > 20
    # They are not even counted: there are 2,999 more.
    assert error.details() == "invalid request: messages[0].role: must be set (and at least 200 more)"
    assert violations_of(error)[-1].description == f"and at least {200 - len(fields) + 2} more"


def test_violations_that_are_all_known_are_counted(gateway: GatewayThread) -> None:
    request = chat_pb2.GenerateRequest(messages=[message_pb2.Message(content="x")] * 200)
    error = refusal(gateway, request)
    assert error.details() == "invalid request: messages[0].role: must be set (and 199 more)"
    assert violations_of(error)[-1].description == f"and {200 - len(violations_of(error)) + 1} more"


@pytest.mark.parametrize("character", ["x", "é", "数", "😀", "\x01"])
@pytest.mark.parametrize("length", [50, 250])
def test_no_refusal_has_more_trailers_than_clients_take(gateway: GatewayThread, character: str, length: int) -> None:
    request = ask("x", model=character * 1000)
    for i in range(200):
        request.chat_template_kwargs[character * length + str(i)] = 1
    with RawConnection(gateway.target) as connection:
        connection.call("Generate", request)
        trailers = connection.trailers() or {}
    assert trailers["grpc-status"] == "3"
    assert sum(len(key) + len(value) + 32 for key, value in trailers.items()) < 8 * 1024  # as RFC 9113 counts


@pytest.mark.parametrize(("octets", "status"), [(16_384, "0"), (16_385, "3")])
def test_metadata_is_bounded_as_rfc_9113_counts_it(gateway: GatewayThread, octets: int, status: str) -> None:
    short = {f"x-{number:03}": "" for number in range(400)}  # 37 each
    with RawConnection(gateway.target) as connection:  # has acknowledged no settings yet, so that gRPC's limits are off
        connection.call("GetModel", chat_pb2.GetModelRequest(), short | {"x-last": "x" * (octets - 400 * 37 - 38)})
        assert connection.status() == status


@pytest.mark.parametrize(("last", "role"), [("", "assistant"), ("x", "user")])
def test_only_a_non_empty_assistant_message_can_be_continued(gateway: GatewayThread, last: str, role: str) -> None:
    request = ask("hi", last) if role == "assistant" else ask(last)
    request.continue_final_message = True
    assert violated_fields(refusal(gateway, request)) == ["continue_final_message"]


def test_a_message_of_10_mb_is_refused_by_its_size(gateway: GatewayThread) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        gateway.stub.Generate(ask("x" * 10_000_000), timeout=20)
    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(gateway: GatewayThread) -> None:
    template_tokens = gateway.stub.Generate(ask("x"), timeout=20).usage.prompt_tokens - 1
    error = refusal(gateway, ask("x" * (4096 - template_tokens)))
    assert (error.code(), reason_of(error)) == (INVALID, "PROMPT_TOO_LONG")
    assert dict(error_info_of(error).metadata) == {"prompt_tokens": "4096", "max_context_tokens": "4096"}
    longest = gateway.stub.Generate(ask("x" * (4095 - template_tokens)), timeout=20)
    assert (longest.usage.prompt_tokens, longest.usage.completion_tokens) == (4095, 1)


def test_another_model_is_not_found(gateway: GatewayThread) -> None:
    error = refusal(gateway, ask("x", model="gpt-5"))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert error_info_of(error).metadata["served"] == "scripted"
    assert gateway.stub.Generate(ask("x", model="scripted"), timeout=20).choices
    with pytest.raises(grpc.RpcError) as raised:
        gateway.stub.GetModel(chat_pb2.GetModelRequest(model="gpt-5"), timeout=20)
    assert reason_of(raised.value) == "MODEL_NOT_FOUND"


def test_fields_are_checked_before_the_model_and_the_model_before_the_length(gateway: GatewayThread) -> None:
    assert reason_of(refusal(gateway, ask("x", model="gpt-5", temperature=-1))) == "INVALID_REQUEST"
    assert reason_of(refusal(gateway, ask("x" * 5000, model="gpt-5"))) == "MODEL_NOT_FOUND"


def test_of_a_model_that_is_not_served_nothing_is_said_to_be_unsupported(gateway: GatewayThread) -> None:
    conversation = {"model": "gpt-5", "messages": ask("x").messages, "tools": [message_pb2.Tool(name="f")]}
    for method, request in (
        (gateway.stub.Generate, chat_pb2.GenerateRequest(**conversation)),
        (gateway.stub.CountTokens, chat_pb2.CountTokensRequest(**conversation)),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            method(request, timeout=20)
        assert reason_of(raised.value) == "MODEL_NOT_FOUND"


@pytest.mark.parametrize("kwargs", [{"enable_thinking": True}, {"messages": []}, {"add_generation_prompt": False}])
def test_chat_template_kwargs_that_the_template_does_not_read_are_named(
    gateway: GatewayThread, kwargs: dict[str, Any]
) -> None:
    struct = Struct()
    struct.update(kwargs)
    assert violated_fields(refusal(gateway, ask("x", chat_template_kwargs=struct))) == [
        f"chat_template_kwargs.{next(iter(kwargs))}"
    ]


def test_a_chat_template_that_raises_is_an_invalid_request(start_gateway: StartGateway, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m['content'] == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endfor %}{{ suffix | default('') }}"
    )
    own = start_gateway(folder=write_tiny_tokenizer(tmp_path, chat_template=template))
    error = refusal(own, ask("bad"))
    assert (error.code(), violated_fields(error)) == (INVALID, ["messages"])
    assert "no bad words" in error.details()
    struct = Struct()
    struct.update({"suffix": "!"})
    assert own.stub.Generate(ask("good", chat_template_kwargs=struct), timeout=20).choices[0].message.content == "good!"


@pytest.mark.parametrize(
    ("request_fields", "field"),
    [
        ({"tools": [message_pb2.Tool(name="f")]}, "tools"),
    ],
)
def test_what_is_not_supported_says_so_and_names_the_field(
    gateway: GatewayThread, request_fields: dict[str, Any], field: str
) -> None:
    error = refusal(gateway, ask("x", **request_fields))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED")
    assert error_info_of(error).metadata["field"] == field


def test_a_token_that_only_the_tokenizer_knows_is_named_and_told_of_at_the_start(
    start_gateway: StartGateway, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = start_gateway(folder=write_tiny_tokenizer(tmp_path, further_specials=["<|image|>"]))  # the worker knows 259
    refused = refusal(own, ask("<|image|>"))
    assert violated_fields(refused) == ["messages"]
    assert "the token '<|image|>', which the tokenizer knows and the model has no embedding for" in refused.details()
    said = "scripted has embeddings for 259 of the 260 tokens of its tokenizer: prompts with others will be refused"
    assert said in caplog.messages
    assert_answers(own)


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_model_without_a_chat_template_is_told_of_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_folder: bool
) -> None:
    folder = write_tiny_tokenizer(tmp_path / "model", chat_template=None)
    model = ModelSettings(model=str(folder if is_folder else tmp_path / "model.gguf"))
    with GatewayThread(replace(scripted_settings(), model=model), scripted_command(folder)) as own:
        assert refusal(own, ask("x")).code() is grpc.StatusCode.FAILED_PRECONDITION
    (warning,) = [message for message in caplog.messages if "no chat template" in message]
    assert ("a chat_template.jinja in its folder would be one" in warning) == is_folder


def test_several_return_sequences_of_a_greedy_request_are_an_error(gateway: GatewayThread) -> None:
    refused = refusal(gateway, ask("x", num_return_sequences=2))
    assert violated_fields(refused) == ["generation_config.num_return_sequences"]
    assert "set a temperature above 0, and do_sample not to false" in refused.details()
    gateway.stub.Generate(ask("x", num_return_sequences=2, temperature=0.5), timeout=10)


def test_refused_calls_carry_the_request_id_in_the_trailers(gateway: GatewayThread) -> None:
    error = refusal(gateway, ask("x", temperature=-1, request_id="mine"))
    assert dict(error.trailing_metadata())["x-request-id"] == "mine"
    assert not [key for key, _ in error.initial_metadata() if key == "x-request-id"]


def test_an_engine_fault_tells_the_request_id_and_nothing_else(gateway: GatewayThread) -> None:
    error = refusal(gateway, ask("!fail", request_id="broken"))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert error.details() == "internal error (request broken)"


def test_a_token_that_the_model_has_no_embedding_for_is_refused(start_gateway: StartGateway, tmp_path: Path) -> None:
    folder = write_tiny_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|unknown|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    own = start_gateway(folder=folder)
    error = refusal(own, ask("hello <|unknown|>"))
    assert (error.code(), violated_fields(error)) == (INVALID, ["messages"])


def test_nan_and_infinities_in_chat_template_kwargs_are_named(gateway: GatewayThread) -> None:
    kwargs = Struct()
    kwargs.update({"extra": {"a": [1, math.inf]}, "other": math.nan})
    fields = violated_fields(refusal(gateway, ask("x", chat_template_kwargs=kwargs, model="gpt-5")))
    assert {"chat_template_kwargs.extra.a[1]", "chat_template_kwargs.other"} <= set(fields)


@pytest.mark.parametrize(
    ("more", "field"),
    [({"num_return_sequences": 2, "do_sample": True}, "resume"), ({"max_new_tokens": 2}, "resume.token_ids")],
)
def test_a_resume_that_contradicts_the_rest_is_invalid(
    gateway: GatewayThread, more: dict[str, Any], field: str
) -> None:
    error = refusal(gateway, ask("x", resume=chat_pb2.Resume(token_ids=[1, 2, 3]), **more))
    assert (error.code(), violated_fields(error)) == (INVALID, [field])


def test_a_template_that_makes_an_empty_prompt_is_an_invalid_request(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    own = start_gateway(folder=write_tiny_tokenizer(tmp_path, chat_template="{{ messages[0]['content'] }}"))
    assert violated_fields(refusal(own, ask(""))) == ["messages"]
    assert own.stub.CountTokens(chat_pb2.CountTokensRequest(messages=ask("").messages), timeout=20).prompt_tokens == 0


def test_a_huge_request_does_not_hold_up_other_calls(gateway: GatewayThread) -> None:
    huge = ask("x", stop_strings=[""] * 1_000_000)
    refused = gateway.stub.Generate.future(huge, timeout=60)
    while not refused.done():  # each of these would time out if the event loop were busy with the other one
        gateway.stub.GetModel(chat_pb2.GetModelRequest(), timeout=2)
    assert violated_fields(refused.exception()) == ["generation_config.stop_strings"]
