"""GenerateBatch: each item is answered or refused as if it had come alone."""

from __future__ import annotations

import time
from collections.abc import Sequence

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2

from parley.v1 import chat_pb2, chat_pb2_grpc
from tests.integration.conftest import FOREVER, StartGateway
from tests.support.gateway import GatewayThread
from tests.support.raw_http2 import RawConnection
from tests.support.requests import ask, reason_of, status_of, violated_fields

Outcome = chat_pb2.GenerateBatchResponse


def batch(gateway: GatewayThread, requests: Sequence[chat_pb2.GenerateRequest], timeout: float = 30) -> list[Outcome]:
    return list(gateway.stub.GenerateBatch(chat_pb2.GenerateBatchRequest(requests=requests), timeout=timeout))


def by_index(outcomes: Sequence[Outcome]) -> dict[int, Outcome]:
    found = {outcome.index: outcome for outcome in outcomes}
    assert len(found) == len(outcomes)
    return found


def reason_in(status: status_pb2.Status) -> str:
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "parley.v1"
    return info.reason


def test_every_item_is_answered_as_it_would_be_alone(gateway: GatewayThread) -> None:
    requests = [ask(f"item {i}", seed=i, temperature=0.5) for i in range(8)]
    outcomes = by_index(batch(gateway, requests))
    for i, request in enumerate(requests):
        response, alone = outcomes[i].response, gateway.stub.Generate(request, timeout=20)
        assert (response.choices, response.usage, response.seed) == (alone.choices, alone.usage, alone.seed)
        assert response.model == "scripted"
        assert response.timings.total.ToTimedelta() >= response.timings.queue.ToTimedelta()


def test_answers_come_as_they_finish(gateway: GatewayThread) -> None:
    call = gateway.stub.GenerateBatch(chat_pb2.GenerateBatchRequest(requests=[FOREVER, ask("short")]), timeout=60)
    assert next(call).index == 1
    assert next(call).response.usage.completion_tokens == 4000
    assert list(call) == []


def test_a_bad_item_fails_alone_with_the_status_it_would_get_alone(gateway: GatewayThread) -> None:
    bad = [
        ask("x", temperature=99, top_p=2),
        ask("x" * 5000),
        ask("x", model="gpt-5"),
        ask("x", response_format={"regex": "["}),
        chat_pb2.GenerateRequest(),
        ask("x", request_id="not valid!"),
    ]
    outcomes = by_index(batch(gateway, [ask("fine"), *bad]))
    assert outcomes[0].response.choices[0].message.content == "fine"
    for i, request in enumerate(bad, start=1):
        with pytest.raises(grpc.RpcError) as raised:
            gateway.stub.Generate(request, timeout=20)
        assert outcomes[i].error == status_of(raised.value)
        assert raised.value.code().value[0] == outcomes[i].error.code


def test_an_engine_fault_ends_its_item_alone_and_tells_its_request_id(gateway: GatewayThread) -> None:
    outcomes = by_index(batch(gateway, [ask("!fail", request_id="broken"), ask("fine")]))
    assert outcomes[0].error.code == code_pb2.INTERNAL
    assert outcomes[0].error.message == "internal error (request broken)"
    assert outcomes[1].response.choices[0].message.content == "fine"


@pytest.mark.parametrize("number", [0, 1025])
def test_a_wrong_number_of_items_fails_the_call(gateway: GatewayThread, number: int) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        batch(gateway, [ask("x")] * number)
    assert (raised.value.code(), reason_of(raised.value)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert violated_fields(raised.value) == ["requests"]
    assert dict(raised.value.trailing_metadata())["x-request-id"]


def test_a_thousand_items_are_answered(start_gateway: StartGateway) -> None:
    own = start_gateway(max_running=4, max_queue=1024)
    outcomes = by_index(batch(own, [ask(f"{i}") for i in range(1024)], timeout=60))
    assert [outcomes[i].response.choices[0].message.content for i in range(1024)] == [f"{i}" for i in range(1024)]


def test_items_beyond_the_queues_room_are_refused_at_once_and_alone(single: GatewayThread) -> None:
    outcomes = batch(single, [ask("!forever", max_new_tokens=200)] * 10)
    refused = [outcome for outcome in outcomes if outcome.HasField("error")]
    assert len(outcomes) == 10
    assert len(refused) == 7
    assert outcomes[:7] == refused
    for outcome in refused:
        assert (outcome.error.code, reason_in(outcome.error)) == (code_pb2.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert outcome.error.details[1].Is(error_details_pb2.RetryInfo.DESCRIPTOR)


def test_items_of_higher_priority_run_sooner(single: GatewayThread) -> None:
    outcomes = batch(single, [ask(f"{i}", priority=priority) for i, priority in enumerate((0, 5, 9))])
    assert [outcome.index for outcome in outcomes] == [2, 1, 0]


def test_each_item_has_a_request_id_of_its_own(gateway: GatewayThread) -> None:
    request = chat_pb2.GenerateBatchRequest(requests=[ask("a", request_id="mine"), ask("b"), ask("c")])
    call = gateway.stub.GenerateBatch(request, metadata=[("x-request-id", "the-call")], timeout=20)
    ids = {outcome.index: outcome.response.request_id for outcome in call}
    assert dict(call.initial_metadata())["x-request-id"] == "the-call"
    assert ids[0] == "mine"
    assert len({*ids.values(), "the-call"}) == 4


def test_cancelling_a_batch_frees_what_runs_what_waits_and_what_is_not_begun(start_gateway: StartGateway) -> None:
    own = start_gateway(worker=("--step-delay", "0.002"), max_running=2, max_queue=500)
    requests = [ask("!wait"), FOREVER, *[ask("x" * 1000)] * 500]
    call = own.stub.GenerateBatch(chat_pb2.GenerateBatchRequest(requests=requests))
    while own.gateway.worker.num_open < 2:
        time.sleep(0.002)
    call.cancel()
    own.wait_idle()
    assert own.gateway.admission.num_waiting == 0
    assert own.stub.Generate(ask("ok"), timeout=10).choices[0].message.content == "ok"


def test_a_deadline_ends_the_call_and_frees_the_engine(single: GatewayThread) -> None:
    call = single.stub.GenerateBatch(
        chat_pb2.GenerateBatchRequest(requests=[ask("quick"), ask("!wait"), ask("waits")]), timeout=1
    )
    assert next(call).response.choices[0].message.content == "quick"
    with pytest.raises(grpc.RpcError) as raised:
        list(call)
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    single.wait_idle()


def test_who_does_not_read_a_batch_holds_up_nobody(start_gateway: StartGateway) -> None:
    own = start_gateway(max_running=1, max_queue=8)
    # More than flow control lets through unread.
    request = chat_pb2.GenerateBatchRequest(requests=[ask("long " * 600, max_new_tokens=3000)] * 8)
    channel = grpc.insecure_channel(own.target, options=[("grpc.http2.lookahead_bytes", 1024)])
    call = chat_pb2_grpc.ChatServiceStub(channel).GenerateBatch(request)
    assert next(call).response.choices
    assert own.stub.Generate(ask("neighbour", priority=-1), timeout=20).choices
    assert len(list(call)) == 7
    channel.close()


def test_items_wait_for_a_reader_who_takes_nothing_and_end_with_his_connection(start_gateway: StartGateway) -> None:
    own = start_gateway(max_running=2, max_queue=100)

    def num_answered() -> float:
        return own.gateway.observer.metrics.batch_items.labels("OK")._value.get()

    with RawConnection(own.target, window=0) as reader:
        reader.call("GenerateBatch", chat_pb2.GenerateBatchRequest(requests=[ask("x" * 50)] * 100))
        while num_answered() < 18:
            time.sleep(0.002)
        assert own.stub.Generate(ask("neighbour"), timeout=20).choices
        time.sleep(0.5)
        assert num_answered() < 25  # and not all: a few may be in gRPC's hands
    own.wait_idle()


@pytest.mark.parametrize(("drain_timeout", "reason"), [(20.0, None), (0.0, "DRAINING")])
def test_a_drain_lets_a_batch_finish_or_ends_each_item_left(
    start_gateway: StartGateway, drain_timeout: float, reason: str | None
) -> None:
    own = start_gateway(worker=("--step-delay", "0.005"), max_running=1, drain_timeout=drain_timeout)
    requests = [ask("quick"), *[ask("slow " * 8)] * 4]
    call = own.stub.GenerateBatch(chat_pb2.GenerateBatchRequest(requests=requests), timeout=30)
    assert next(call).index == 0
    own.loop.call_soon_threadsafe(own.gateway.begin_shutdown)
    rest = list(call)
    assert len(rest) == 4
    assert {reason_in(item.error) if item.HasField("error") else None for item in rest} == {reason}
