"""Start, readiness, health and drain."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from parley.v1 import chat_pb2
from tests.integration.conftest import StartGateway
from tests.support.gateway import GatewayThread
from tests.support.requests import ask, reason_of, retry_delay_of
from tests.support.watched_gateway import watched_gateway

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
BOTH = ("", "parley.v1.ChatService")


def health_of(gateway: GatewayThread) -> set[int]:
    return {gateway.health.Check(health_pb2.HealthCheckRequest(service=s), timeout=5).status for s in BOTH}


def test_every_call_answers_not_ready_while_the_model_loads(start_gateway: StartGateway) -> None:
    gateway = start_gateway(worker=("--load-delay", "1.5"), wait_ready=False)
    assert health_of(gateway) == {NOT_SERVING}
    calls = [
        lambda: gateway.stub.Generate(ask("x"), timeout=5),
        lambda: gateway.stub.Generate(chat_pb2.GenerateRequest(), timeout=5),
        lambda: list(gateway.stub.GenerateStream(ask("x"), timeout=5)),
        lambda: list(gateway.stub.GenerateBatch(chat_pb2.GenerateBatchRequest(), timeout=5)),
        lambda: gateway.stub.CountTokens(chat_pb2.CountTokensRequest(), timeout=5),
        lambda: gateway.stub.GetModel(chat_pb2.GetModelRequest(), timeout=5),
    ]
    for call in calls:
        with pytest.raises(grpc.RpcError) as raised:
            call()
        assert (raised.value.code(), reason_of(raised.value)) == (grpc.StatusCode.UNAVAILABLE, "NOT_READY")
        assert retry_delay_of(raised.value) > 0
    gateway.wait_health(SERVING)
    assert health_of(gateway) == {SERVING}
    assert gateway.stub.Generate(ask("x"), timeout=5).choices


@pytest.mark.parametrize(
    ("error", "told"),
    [("no such model", "no such model"), ("no file \udcff", "no file ?")],
    ids=["text", "half a pair"],
)
def test_a_model_that_cannot_be_loaded_ends_the_service_with_its_reason(
    start_gateway: StartGateway, error: str, told: str
) -> None:
    gateway = start_gateway(worker=("--load-error", error), wait_ready=False)
    gateway.thread.join(20)
    assert str(gateway.error) == told


def test_the_health_watch_lasts_and_tells_of_the_drain(start_gateway: StartGateway) -> None:
    gateway = start_gateway(worker=("--step-delay", "0.01"), drain_timeout=10)
    seen: list[int] = []
    watch = gateway.health.Watch(health_pb2.HealthCheckRequest(service="parley.v1.ChatService"))
    first = threading.Event()

    def collect() -> None:
        try:
            for response in watch:
                seen.append(response.status)
                first.set()
        except grpc.RpcError:
            pass

    collector = threading.Thread(target=collect)
    collector.start()
    assert first.wait(5)
    gateway.stop()
    collector.join(10)
    assert seen == [SERVING, NOT_SERVING]


def test_draining_lets_streams_finish_and_refuses_new_calls(start_gateway: StartGateway) -> None:
    gateway = start_gateway(worker=("--step-delay", "0.01"), drain_timeout=20)
    stream = gateway.stub.GenerateStream(ask("!forever", max_new_tokens=150))
    received = list(next(stream).token_ids)
    gateway.loop.call_soon_threadsafe(gateway.gateway.begin_shutdown)
    gateway.wait_health(NOT_SERVING)
    with pytest.raises(grpc.RpcError) as raised:
        gateway.stub.Generate(ask("x"), timeout=5)
    assert (raised.value.code(), reason_of(raised.value)) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert retry_delay_of(raised.value) > 0
    received += [i for response in stream for i in response.token_ids]
    assert len(received) == 150
    gateway.stop()


def test_new_calls_are_still_served_during_the_drain_delay(start_gateway: StartGateway) -> None:
    gateway = start_gateway(drain_delay=1.5)
    gateway.loop.call_soon_threadsafe(gateway.gateway.begin_shutdown)
    gateway.wait_health(NOT_SERVING)
    assert gateway.stub.Generate(ask("late"), timeout=5).choices[0].message.content == "late"


def test_streams_that_do_not_finish_in_time_end_with_draining(start_gateway: StartGateway) -> None:
    gateway = start_gateway(worker=("--step-delay", "0.01"), drain_timeout=0.3)
    running = gateway.stub.GenerateStream(ask("!forever", max_new_tokens=4000))
    next(running)
    queued = gateway.stub.Generate.future(ask("queued"))
    while gateway.gateway.admission.num_waiting == 0:
        time.sleep(0.002)
    gateway.loop.call_soon_threadsafe(gateway.gateway.begin_shutdown)
    for call in (lambda: list(running), lambda: queued.result(10)):
        with pytest.raises(grpc.RpcError) as raised:
            call()
        assert (raised.value.code(), reason_of(raised.value)) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    gateway.stop()


def test_a_second_request_to_shut_down_ends_open_calls_with_draining(start_gateway: StartGateway) -> None:
    gateway = start_gateway(worker=("--step-delay", "0.01"), drain_delay=20, drain_timeout=20)
    running = gateway.stub.GenerateStream(ask("!forever", max_new_tokens=4000))
    next(running)
    for _ in range(2):
        gateway.loop.call_soon_threadsafe(gateway.gateway.begin_shutdown)
    with pytest.raises(grpc.RpcError) as raised:
        list(running)
    assert reason_of(raised.value) == "DRAINING"
    gateway.stop()


@pytest.mark.parametrize("num_signals", [1, 2])
def test_a_call_whose_grammar_is_being_checked_ends_with_draining_too(
    start_gateway: StartGateway, num_signals: int
) -> None:
    gateway = start_gateway(drain_timeout=0.3 if num_signals == 1 else 30)
    gateway.stub.Generate(ask("x", response_format={"regex": "a"}), timeout=60)
    # Takes minutes, of which the checker grants seconds.
    endless = '{"allOf": [{"multipleOf": 997}, {"multipleOf": 991}, {"multipleOf": 983}]}'
    call = gateway.stub.Generate.future(ask("x", response_format={"json_schema": endless}), timeout=60)
    while gateway.gateway.doorkeeper.num_open == 0:
        time.sleep(0.002)
    time.sleep(0.1)
    for _ in range(num_signals):
        gateway.loop.call_soon_threadsafe(gateway.gateway.begin_shutdown)
    error = call.exception(10)
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    gateway.stop()


def test_a_gateway_that_can_open_no_file_any_more_shuts_down_as_any(tokenizer_folder: Path) -> None:
    with watched_gateway(tokenizer_folder, max_running=1) as gateway:
        resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (1, 1))
        assert gateway.worst()  # told only where nothing was raised


def reflect(gateway: GatewayThread, version: str, **question: str) -> reflection_pb2.ServerReflectionResponse:
    call = gateway.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    (response,) = call(iter([reflection_pb2.ServerReflectionRequest(**question)]), timeout=5)
    return response


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_lists_the_services(gateway: GatewayThread, version: str) -> None:
    response = reflect(gateway, version, list_services="")
    names = {service.name for service in response.list_services_response.service}
    assert {"parley.v1.ChatService", "grpc.health.v1.Health"} <= names


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
@pytest.mark.parametrize(
    ("symbol", "file"),
    [
        ("grpc.reflection.{}.ServerReflection", "{}"),
        ("parley.v1.ChatService", "parley/v1/chat.proto"),
        ("parley.v1.ChatService.Generate", "parley/v1/chat.proto"),
        ("grpc.health.v1.Health.Watch", "health.proto"),
        ("parley.v1.Message.role", "parley/v1/message.proto"),
        ("parley.v1.ErrorReason", "parley/v1/errors.proto"),
    ],
)
def test_reflection_knows_every_symbol(gateway: GatewayThread, version: str, symbol: str, file: str) -> None:
    response = reflect(gateway, version, file_containing_symbol=symbol.format(version))
    files = response.file_descriptor_response.file_descriptor_proto
    assert file.format(version) in FileDescriptorProto.FromString(files[0]).name


@pytest.mark.parametrize("symbol", ["parley.v1.ChatService.Nothing", "parley.v1.Nothing", "Nothing", ""])
def test_reflection_finds_nothing_where_there_is_nothing(gateway: GatewayThread, symbol: str) -> None:
    response = reflect(gateway, "v1", file_containing_symbol=symbol)
    assert response.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_buf_lists_the_methods_through_reflection(gateway: GatewayThread) -> None:
    buf = Path(sys.executable).parent / "buf"
    command = [str(buf), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--list-methods"]
    result = subprocess.run(
        [*command, f"http://{gateway.target}"], capture_output=True, text=True, check=True, timeout=60
    )
    assert "parley.v1.ChatService/GenerateStream" in result.stdout
