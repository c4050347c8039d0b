"""Clients that go away, and full queues: what is left over, and what others see."""

from __future__ import annotations

import time

import grpc
import pytest

from parley.v1 import chat_pb2
from tests.integration.conftest import FOREVER, StartGateway, assert_answers
from tests.support.eventually import eventually
from tests.support.gateway import GatewayThread
from tests.support.requests import ask, reason_of, retry_delay_of


def test_a_stream_cancelled_in_the_middle_frees_the_engine(single: GatewayThread) -> None:
    call = single.stub.GenerateStream(FOREVER)
    for _, response in zip(range(3), call, strict=False):
        assert response.token_ids
    call.cancel()
    single.wait_idle()
    assert_answers(single)


def test_a_unary_call_cancelled_frees_the_engine(single: GatewayThread) -> None:
    future = single.stub.Generate.future(FOREVER)
    eventually(lambda: single.gateway.worker.num_open == 1)
    future.cancel()
    single.wait_idle()
    assert_answers(single)


def test_a_client_gone_before_the_first_token_frees_the_engine(single: GatewayThread) -> None:
    call = single.stub.GenerateStream(ask("!wait"))
    eventually(lambda: single.gateway.worker.num_open == 1)
    call.cancel()
    single.wait_idle()
    assert_answers(single)


def test_a_client_gone_while_waiting_leaves_the_queue(single: GatewayThread) -> None:
    running = single.stub.GenerateStream(FOREVER)
    next(running)
    waiting = single.stub.GenerateStream(ask("never begun"))
    eventually(lambda: single.gateway.admission.num_waiting == 1)
    waiting.cancel()
    eventually(lambda: single.gateway.admission.num_waiting == 0)
    running.cancel()
    assert_answers(single)


def test_a_broken_connection_frees_the_engine(single: GatewayThread) -> None:
    channel = grpc.insecure_channel(single.target, options=[("grpc.use_local_subchannel_pool", 1)])
    call = channel.unary_stream(
        "/parley.v1.ChatService/GenerateStream",
        request_serializer=chat_pb2.GenerateRequest.SerializeToString,
        response_deserializer=chat_pb2.GenerateStreamResponse.FromString,
    )(FOREVER)
    next(call)
    channel.close()
    single.wait_idle()
    assert_answers(single)


@pytest.mark.parametrize("timeout_s", [0.001, 0.1])
def test_a_deadline_ends_the_call_and_frees_the_engine(single: GatewayThread, timeout_s: float) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        single.stub.Generate(FOREVER, timeout=timeout_s)
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    single.wait_idle()
    assert_answers(single)


def test_what_expires_in_the_queue_never_reaches_the_engine(single: GatewayThread) -> None:
    running = single.stub.GenerateStream(FOREVER)
    next(running)
    with pytest.raises(grpc.RpcError) as raised:
        single.stub.Generate(ask("never begun"), timeout=0.3)
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: single.gateway.admission.num_waiting == 0)
    assert single.gateway.worker.next_key() == 1  # of all requests, only the running one was ever given a key
    running.cancel()


def test_at_its_deadline_amid_an_answer_the_engine_is_free_within_a_step(single: GatewayThread) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        list(single.stub.GenerateStream(FOREVER, timeout=2.0))
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: single.gateway.load().engine.num_running == 0)  # to its end the answer takes 20 s
    num_generated = single.gateway.load().engine.num_generated_tokens
    time.sleep(0.3)
    assert single.gateway.load().engine.num_generated_tokens == num_generated
    assert 0 < num_generated < FOREVER.generation_config.max_new_tokens


def test_a_full_queue_refuses_at_once_and_says_when_to_retry(single: GatewayThread) -> None:
    running = single.stub.GenerateStream(FOREVER)
    next(running)
    waiting = [single.stub.Generate.future(ask(f"waiter {i}")) for i in range(2)]
    eventually(lambda: single.gateway.admission.num_waiting == 2)
    with pytest.raises(grpc.RpcError) as raised:
        single.stub.Generate(ask("one too many"), timeout=10)
    assert (raised.value.code(), reason_of(raised.value)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert retry_delay_of(raised.value) > 0
    running.cancel()
    assert [f.result(10).choices[0].message.content for f in waiting] == ["waiter 0", "waiter 1"]


def test_max_queue_0_refuses_whatever_cannot_start_at_once(start_gateway: StartGateway) -> None:
    gateway = start_gateway(max_running=1, max_queue=0)
    assert_answers(gateway)
    running = gateway.stub.GenerateStream(ask("!wait"))
    eventually(lambda: gateway.gateway.admission.num_running == 1)
    with pytest.raises(grpc.RpcError) as raised:
        gateway.stub.Generate(ask("x"), timeout=10)
    assert reason_of(raised.value) == "QUEUE_FULL"
    assert raised.value.details().startswith("no room for more (running: 1, waiting: 0); try again in ")
    with pytest.raises(grpc.RpcError) as raised:
        gateway.stub.Generate(ask("x" * 5000), timeout=10)
    assert reason_of(raised.value) == "PROMPT_TOO_LONG", "to be told first: no retry would help"
    running.cancel()
    gateway.wait_idle()
    assert_answers(gateway)


def test_no_more_run_than_the_engine_can(start_gateway: StartGateway, caplog: pytest.LogCaptureFixture) -> None:
    gateway = start_gateway(max_running=8, worker=("--max-running", "1"))
    assert "--max-running is capped" in caplog.text
    running = gateway.stub.GenerateStream(ask("!wait"))
    eventually(lambda: gateway.gateway.admission.num_running == 1)
    waiting = gateway.stub.Generate.future(ask("x"), timeout=10)
    eventually(lambda: gateway.gateway.admission.num_waiting == 1)
    running.cancel()
    assert waiting.result().choices
    gateway.wait_idle()


def test_higher_priority_leaves_the_queue_sooner(single: GatewayThread) -> None:
    running = single.stub.GenerateStream(FOREVER)
    next(running)
    finished: list[str] = []
    low = single.stub.Generate.future(ask("low"))
    low.add_done_callback(lambda _: finished.append("low"))
    eventually(lambda: single.gateway.admission.num_waiting == 1)
    high = single.stub.Generate.future(ask("high", priority=5))
    high.add_done_callback(lambda _: finished.append("high"))
    eventually(lambda: single.gateway.admission.num_waiting == 2)
    running.cancel()
    low.result(10), high.result(10)
    eventually(lambda: len(finished) == 2)
    assert finished == ["high", "low"]
