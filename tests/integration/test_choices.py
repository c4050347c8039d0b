"""Several answers to one request: told apart by index, in unary answers and streams, ended and freed together."""

from __future__ import annotations

import time

import grpc
import pytest

from parley.v1 import chat_pb2, generation_pb2
from tests.integration.conftest import StartGateway
from tests.support.gateway import GatewayThread
from tests.support.requests import ask, reason_of, violated_fields

STOP, LENGTH = generation_pb2.FINISH_REASON_STOP, generation_pb2.FINISH_REASON_LENGTH


def several(text: str, number: int = 3, **fields: object) -> chat_pb2.GenerateRequest:
    return ask(text, num_return_sequences=number, do_sample=True, **fields)


@pytest.mark.parametrize("number", [1, 2, 3, 16])  # 16: more than run at once
def test_each_choice_is_an_answer_of_its_own(gateway: GatewayThread, number: int) -> None:
    response = gateway.stub.Generate(several("!choice", number), timeout=20)
    assert [choice.index for choice in response.choices] == [*range(number)]
    assert [choice.message.content for choice in response.choices] == [f"choice {i}" for i in range(number)]
    assert {choice.finish_reason for choice in response.choices} == {STOP}
    assert response.usage.completion_tokens == sum(len(choice.token_ids) for choice in response.choices)
    single = gateway.stub.Generate(ask("!choice"), timeout=20)
    assert response.choices[0] == single.choices[0]
    assert response.usage.prompt_tokens == single.usage.prompt_tokens


def test_a_stream_tells_the_choices_apart_and_their_deltas_make_the_unary_answer(gateway: GatewayThread) -> None:
    request = several("!choice", 4, seed=5, logprobs=True)
    unary = gateway.stub.Generate(request, timeout=20)
    responses = list(gateway.stub.GenerateStream(request, timeout=20))
    for choice in unary.choices:
        mine = [r for r in responses if r.index == choice.index]
        assert "".join(r.content for r in mine) == choice.message.content
        assert [i for r in mine for i in r.token_ids] == list(choice.token_ids)
        assert [one for r in mine for one in r.logprobs] == list(choice.logprobs)
        assert [r.finish_reason for r in mine] == [0] * (len(mine) - 1) + [STOP]
    assert [bool(r.seed) for r in responses] == [True] + [False] * (len(responses) - 1)
    assert [r.HasField("usage") for r in responses] == [False] * (len(responses) - 1) + [True]
    assert responses[-1].usage == unary.usage and responses[-1].HasField("timings")


def test_choices_are_made_side_by_side(start_gateway: StartGateway) -> None:
    gateway = start_gateway(max_running=4, worker=("--step-delay", "0.01"))
    indices = [r.index for r in gateway.stub.GenerateStream(several("!choice", 4), timeout=20)]
    assert set(indices[:8]) == {0, 1, 2, 3}


def test_a_choice_ends_by_itself(gateway: GatewayThread) -> None:
    (first, second) = gateway.stub.Generate(several("!choice", 2, stop_strings=["e 1"]), timeout=20).choices
    assert (first.message.content, first.stop_string) == ("choice 0", "")
    assert (second.message.content, second.stop_string) == ("choic", "e 1")


@pytest.mark.parametrize("failing", [0, 2])
def test_the_failure_of_one_choice_ends_the_call_and_frees_the_others(gateway: GatewayThread, failing: int) -> None:
    for call in (gateway.stub.Generate, lambda *a, **k: list(gateway.stub.GenerateStream(*a, **k))):
        with pytest.raises(grpc.RpcError) as raised:
            call(several(f"!fail {failing}", ignore_eos=True, max_new_tokens=4000), timeout=20)
        assert reason_of(raised.value) == "INTERNAL"
        gateway.wait_idle()


@pytest.mark.parametrize("order", ["!forever", "!wait"])
def test_cancelling_frees_all_choices(gateway: GatewayThread, order: str) -> None:
    call = gateway.stub.GenerateStream(several(order, max_new_tokens=4000), timeout=20)
    if order == "!forever":
        seen: set[int] = set()
        while seen != {0, 1, 2}:
            seen.add(next(call).index)
    call.cancel()
    gateway.wait_idle()


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_a_unary_call_that_is_given_up_frees_all_choices(gateway: GatewayThread, how: str) -> None:
    future = gateway.stub.Generate.future(several("!wait"), timeout=0.5 if how == "expired" else 20)
    if how == "cancelled":
        while not gateway.gateway.worker.num_open:
            time.sleep(0.005)
        future.cancel()
    else:
        assert future.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    gateway.wait_idle()


def test_choices_take_a_slot_each_and_never_more_than_there_are(start_gateway: StartGateway) -> None:
    gateway = start_gateway(max_running=2, max_queue=1, worker=("--max-running", "2", "--step-delay", "0.01"))
    forever = gateway.stub.GenerateStream(several("!forever", 2, max_new_tokens=4000), timeout=60)
    assert {next(forever).index for _ in range(20)} == {0, 1}
    waiting = gateway.stub.Generate.future(several("!choice", 5), timeout=20)
    while not gateway.gateway.admission.num_waiting:
        time.sleep(0.005)
    with pytest.raises(grpc.RpcError) as raised:
        gateway.stub.Generate(ask("x"), timeout=20)
    assert reason_of(raised.value) == "QUEUE_FULL"
    forever.cancel()
    assert len(waiting.result().choices) == 5
    gateway.wait_idle()


def test_choices_survive_the_worker(start_gateway: StartGateway) -> None:
    # What a step made has come before the next one, in which they may die: who dies is not blamed for what was lost.
    gateway = start_gateway(worker=("--step-delay", "0.02"), max_running=4)
    response = gateway.stub.Generate(several("!die-at 5 hello world", 3, logprobs=True), timeout=60)
    assert [choice.message.content for choice in response.choices] == ["hello world"] * 3
    assert all([one.token_id for one in choice.logprobs] == list(choice.token_ids) for choice in response.choices)


def test_a_model_may_say_how_many_unless_the_request_does(start_gateway: StartGateway) -> None:
    stub = start_gateway(max_running=2, worker=("--num-return-sequences", "2", "--do-sample")).stub
    defaults = stub.GetModel(chat_pb2.GetModelRequest(), timeout=20).default_generation_config
    assert defaults.num_return_sequences == 2
    assert len(stub.Generate(ask("!choice"), timeout=20).choices) == 2
    assert len(stub.Generate(several("!choice", 1), timeout=20).choices) == 1
    with pytest.raises(grpc.RpcError) as raised:
        stub.Generate(ask("hello", resume=chat_pb2.Resume(token_ids=b"he")), timeout=20)
    assert violated_fields(raised.value) == ["resume"]


def test_a_greedy_request_has_one_answer_however_many_the_model_says(start_gateway: StartGateway) -> None:
    stub = start_gateway(max_running=2, worker=("--num-return-sequences", "2")).stub
    defaults = stub.GetModel(chat_pb2.GetModelRequest(), timeout=20).default_generation_config
    assert defaults.num_return_sequences == 1
    assert len(stub.Generate(ask("!choice"), timeout=20).choices) == 1
    assert len(stub.Generate(ask("!choice", do_sample=True), timeout=20).choices) == 2
