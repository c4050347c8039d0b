"""What calls hold is free as they end, however they end: it does not wait for garbage to be collected."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import suppress

import grpc
import pytest
from grpc_health.v1 import health_pb2

from parley.v1 import chat_pb2
from parleyd.telemetry.call import Call
from tests.integration.conftest import FOREVER
from tests.support.eventually import eventually
from tests.support.gateway import GatewayThread
from tests.support.requests import ask

NUM_CALLS = 5


@pytest.fixture
def without_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def answered(gateway: GatewayThread) -> None:
    gateway.stub.Generate(ask("hello"), timeout=10)


def invalid(gateway: GatewayThread) -> None:
    gateway.stub.Generate(ask("x", temperature=99), timeout=10)


def too_long(gateway: GatewayThread) -> None:
    gateway.stub.Generate(ask("x" * 5000), timeout=10)  # which a thread finds out


def failed(gateway: GatewayThread) -> None:
    list(gateway.stub.GenerateStream(ask("!fail"), timeout=10))


def late(gateway: GatewayThread) -> None:
    gateway.stub.Generate(FOREVER, timeout=0.1)


def cancelled(gateway: GatewayThread) -> None:
    call = gateway.stub.GenerateStream(FOREVER)
    next(call)
    call.cancel()


def batch(gateway: GatewayThread) -> None:
    requests = [ask("good"), ask("x", temperature=99), ask("!fail")]
    list(gateway.stub.GenerateBatch(chat_pb2.GenerateBatchRequest(requests=requests), timeout=10))


def cancelled_batch(gateway: GatewayThread) -> None:
    call = gateway.stub.GenerateBatch(chat_pb2.GenerateBatchRequest(requests=[FOREVER, ask("good")]))
    next(call)
    call.cancel()


def cancelled_in_the_queue(gateway: GatewayThread) -> None:
    running = gateway.stub.GenerateBatch(chat_pb2.GenerateBatchRequest(requests=[FOREVER] * 40))
    eventually(lambda: gateway.gateway.admission.num_waiting >= 8)
    running.cancel()


def unknown_to_health(gateway: GatewayThread) -> None:
    gateway.health.Check(health_pb2.HealthCheckRequest(service="unknown"), timeout=10)


@pytest.mark.usefixtures("without_gc")
@pytest.mark.parametrize(
    "call",
    [
        answered,
        invalid,
        too_long,
        failed,
        late,
        cancelled,
        batch,
        cancelled_batch,
        cancelled_in_the_queue,
        unknown_to_health,
    ],
)
def test_a_call_that_has_ended_is_forgotten(gateway: GatewayThread, call: Callable[[GatewayThread], None]) -> None:
    before = num_held()
    for _ in range(NUM_CALLS):
        with suppress(grpc.RpcError):
            call(gateway)
    gateway.wait_idle()
    # The last one may be about to go.
    eventually(lambda: num_held() < before + NUM_CALLS, lambda: f"{num_held() - before} are held")


def num_held() -> int:
    """Requests, and what is known of calls."""
    kinds = {Call, chat_pb2.GenerateRequest, chat_pb2.GenerateBatchRequest, health_pb2.HealthCheckRequest}
    # Not isinstance, which asks the objects themselves: torch has one that warns of it.
    return sum(type(each) in kinds for each in gc.get_objects())
