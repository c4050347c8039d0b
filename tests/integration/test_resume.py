"""An answer taken up after output that the client has: the two parts are the uncut answer, wherever it was cut."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from parley.v1 import chat_pb2, generation_pb2
from tests.integration.conftest import FOREVER, StartGateway
from tests.support.eventually import eventually
from tests.support.gateway import GatewayThread
from tests.support.requests import ask, reason_of
from tests.support.tiny_tokenizer import IM_END_ID, IM_START_ID

STOP, LENGTH = generation_pb2.FINISH_REASON_STOP, generation_pb2.FINISH_REASON_LENGTH

PIECES = [[ord("a")], [ord("b")], [ord(" ")], [*"é".encode()], [*"😀".encode()], [0xF0], [0x9F], [IM_START_ID]]
ANSWERS = st.lists(st.sampled_from(PIECES), max_size=8).map(lambda pieces: [i for piece in pieces for i in piece])
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "stop_strings": st.lists(st.text("ab é😀", min_size=1, max_size=4), max_size=3),
        "include_stop_string": st.booleans(),
        "stop_token_ids": st.lists(st.sampled_from([ord("b"), 0x9F]), max_size=1),
        "min_new_tokens": st.integers(0, 6),
        "max_new_tokens": st.integers(6, 14),
        "ignore_eos": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "top_logprobs": st.integers(0, 2),
    },
)


def resumed(request: chat_pb2.GenerateRequest, token_ids: list[int]) -> chat_pb2.GenerateRequest:
    copy = chat_pb2.GenerateRequest()
    copy.CopyFrom(request)
    copy.resume.token_ids.extend(token_ids)
    return copy


def joined(responses: list[chat_pb2.GenerateStreamResponse]) -> tuple[Any, ...]:
    return (
        "".join(r.content for r in responses),
        [i for r in responses for i in r.token_ids],
        [one for r in responses for one in r.logprobs],
        *(responses[-1].finish_reason, responses[-1].stop_string),
        *(responses[-1].usage.prompt_tokens, responses[-1].usage.completion_tokens),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=ANSWERS, fields=FIELDS)
@example([*b"aab"], {"stop_strings": ["ab"]})
@example([*b"aab"], {"stop_strings": ["ab"], "include_stop_string": True, "min_new_tokens": 2})
@example([*b"aa"], {"stop_strings": ["aab"], "max_new_tokens": 6})
@example([*"😀".encode()], {"skip_special_tokens": False, "stop_strings": ["😀<|im_end|>"]})
def test_the_delivered_and_the_resumed_part_are_the_uncut_answer(
    gateway: GatewayThread, ids: list[int], fields: dict[str, Any]
) -> None:
    request = ask(f"!ids {' '.join(map(str, ids))}", **{"max_new_tokens": 14, **fields})
    uncut = list(gateway.stub.GenerateStream(request, timeout=20))
    expected = joined(uncut)
    for cut in range(1, len(uncut) + 1):
        delivered = [i for r in uncut[:cut] for i in r.token_ids]
        rest = list(gateway.stub.GenerateStream(resumed(request, delivered), timeout=20))
        assert joined([*uncut[:cut], *rest]) == expected
        assert rest[0].request_id and rest[0].model and rest[-1].HasField("timings")


def test_a_unary_answer_holds_only_what_follows_and_its_usage_tells_the_whole(gateway: GatewayThread) -> None:
    response = gateway.stub.Generate(resumed(ask("hello world"), [*b"hello"]), timeout=20)
    (choice,) = response.choices
    assert (choice.message.content, bytes(choice.token_ids[:-1])) == (" world", b" world")
    assert response.usage.completion_tokens == len("hello world") + 1


@pytest.mark.parametrize(
    ("ids", "fields", "finish_reason", "stop_string"),
    [
        ([*b"hello", IM_END_ID], {}, STOP, ""),
        ([*b"hel", IM_END_ID, *b"lo"], {}, STOP, ""),
        ([*b"hello"], {"max_new_tokens": 5}, LENGTH, ""),
        ([*b"hello"], {"stop_strings": ["ell"]}, STOP, "ell"),
        ([*b"hello"], {"stop_token_ids": [ord("o")]}, STOP, ""),
        ([ord("x")] * 4090, {"max_new_tokens": 4096}, LENGTH, ""),
    ],
)  # fmt: skip
def test_ids_that_end_the_answer_are_answered_with_the_reason_alone(
    gateway: GatewayThread, ids: list[int], fields: dict[str, Any], finish_reason: int, stop_string: str
) -> None:
    request = resumed(ask("hello", request_id="r", seed=3, **fields), ids)
    (response,) = gateway.stub.GenerateStream(request, timeout=20)
    assert (response.content, list(response.token_ids)) == ("", [])
    assert (response.finish_reason, response.stop_string) == (finish_reason, stop_string)
    assert (response.request_id, response.model, response.seed) == ("r", "scripted", 3)
    assert response.usage.completion_tokens == len(ids)
    (choice,) = gateway.stub.Generate(request, timeout=20).choices
    assert (choice.message.content, choice.finish_reason) == ("", finish_reason)


def test_an_empty_resume_is_none(gateway: GatewayThread) -> None:
    request = ask("hello", seed=1)
    assert gateway.stub.Generate(resumed(request, []), timeout=20).choices == (
        gateway.stub.Generate(request, timeout=20).choices
    )
    several = ask("hello", num_return_sequences=2, do_sample=True, resume=chat_pb2.Resume())
    assert len(gateway.stub.Generate(several, timeout=20).choices) == 2


def test_resumed_output_counts_among_the_tokens_that_may_wait(start_gateway: StartGateway) -> None:
    gateway = start_gateway(max_running=1, max_queue=10, max_queue_tokens=200)
    running = gateway.stub.GenerateStream(FOREVER)
    next(running)
    waiting = gateway.stub.Generate.future(ask("hello"), timeout=20)
    eventually(lambda: gateway.gateway.admission.num_waiting == 1, "it does not wait")
    with pytest.raises(grpc.RpcError) as raised:
        gateway.stub.Generate(resumed(ask("hello", max_new_tokens=300), [ord("a")] * 200), timeout=20)
    assert reason_of(raised.value) == "QUEUE_FULL"
    running.cancel()
    assert waiting.result().choices[0].message.content == "hello"
