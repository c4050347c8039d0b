"""Through Envoy as through nothing: answers, deadlines, cancellation; and what Envoy adds: balance, health, retries."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from parley.v1 import chat_pb2_grpc
from parley_client import Client, user
from tests.support.envoy import Envoy
from tests.support.gateway import GatewayThread
from tests.support.replica import Replica
from tests.support.requests import ask, reason_of

FOREVER = ask("!forever", max_new_tokens=4000)


@pytest.fixture
def stub(envoy: Envoy) -> Iterator[chat_pb2_grpc.ChatServiceStub]:
    with grpc.insecure_channel(envoy.target) as channel:
        yield chat_pb2_grpc.ChatServiceStub(channel)


def num_answered(gateway: GatewayThread) -> float:
    registry = gateway.gateway.observer.metrics.registry
    return registry.get_sample_value("parley_requests_total", {"method": "Generate", "code": "OK"}) or 0.0


def test_answers_come_through_whole_or_as_they_are_made(stub: chat_pb2_grpc.ChatServiceStub) -> None:
    text = "through the mesh " * 20
    assert stub.Generate(ask(text), timeout=10).choices[0].message.content == text
    deltas = list(stub.GenerateStream(ask(text), timeout=10))
    assert "".join(delta.content for delta in deltas) == text
    assert len(deltas) > 20


def test_errors_keep_their_details(stub: chat_pb2_grpc.ChatServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        stub.Generate(ask("x", temperature=-1.0), timeout=10)
    assert (raised.value.code(), reason_of(raised.value)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


def test_deadlines_and_cancellation_reach_the_replica(
    stub: chat_pb2_grpc.ChatServiceStub, gateways: list[GatewayThread]
) -> None:
    started = time.monotonic()
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.GenerateStream(FOREVER, timeout=0.5))
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - started < 5
    call = stub.GenerateStream(FOREVER)
    next(call)
    call.cancel()
    for gateway in gateways:
        gateway.wait_idle()


@pytest.mark.alone
def test_both_replicas_are_used_and_the_one_under_load_less(
    stub: chat_pb2_grpc.ChatServiceStub, gateways: list[GatewayThread]
) -> None:
    busy, free = gateways
    held = [busy.stub.GenerateStream(FOREVER) for _ in range(3)]
    for call in held:
        next(call)
    end = time.monotonic() + 6
    begin = None
    while time.monotonic() < end:
        stub.Generate(ask("which one?"), timeout=10)
        if begin is None and time.monotonic() > end - 3:  # Envoy knows their weights by then
            begin = (num_answered(busy), num_answered(free))
    assert begin is not None
    by_busy, by_free = num_answered(busy) - begin[0], num_answered(free) - begin[1]
    print(f"{by_busy:.0f} by the replica under load, {by_free:.0f} by the other")
    assert 0 < by_busy < 0.8 * by_free
    for call in held:
        call.cancel()


def test_a_replica_that_drains_gets_no_new_calls_and_nobody_notices(
    envoy_of_replicas: Envoy, replicas: list[Replica]
) -> None:
    with grpc.insecure_channel(envoy_of_replicas.target) as channel, ThreadPoolExecutor(8) as pool:
        stub = chat_pb2_grpc.ChatServiceStub(channel)
        is_over = False

        def ask_on() -> int:
            number = 0
            while not is_over:
                text = f"answer {number} "
                response = stub.Generate(ask(text), timeout=20)
                assert response.choices[0].message.content == text
                number += 1
            return number

        asking = [pool.submit(ask_on) for _ in range(8)]
        try:
            for replica in replicas:
                replica.terminate()
                replica.start()
                envoy_of_replicas.wait_healthy(2)
        finally:
            is_over = True
        assert sum(future.result() for future in asking) > 20


def test_a_stream_goes_on_when_its_replica_is_killed(envoy_of_replicas: Envoy, replicas: list[Replica]) -> None:
    text = "long enough to be killed in its middle " * 10
    with Client(envoy_of_replicas.target) as client:
        stream = client.stream([user(text)], timeout=60)
        content = "".join(str(next(stream)) for _ in range(5))
        (port,) = envoy_of_replicas.busy_ports()
        (serving,) = (replica for replica in replicas if replica.port == port)
        serving.kill()
        content += "".join(map(str, stream))
        assert content == text
        assert envoy_of_replicas.busy_ports() == []


def test_a_call_whose_replica_is_killed_is_made_again_at_the_other(
    envoy_of_replicas: Envoy, replicas: list[Replica]
) -> None:
    text = "long enough to be killed in its middle " * 4
    with grpc.insecure_channel(envoy_of_replicas.target) as channel:
        call = chat_pb2_grpc.ChatServiceStub(channel).Generate.future(ask(text), timeout=60)
        while not (ports := envoy_of_replicas.busy_ports()):
            assert not call.done()
        (serving,) = (replica for replica in replicas if [replica.port] == ports)
        serving.kill()
        assert call.result().choices[0].message.content == text
