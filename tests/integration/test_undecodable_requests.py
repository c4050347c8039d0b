"""Bytes that are no request, or none yet: a clear status, no trace, and the next good request succeeds."""

from __future__ import annotations

import logging
import time
from base64 import b64decode

import grpc
import pytest

from parley.v1 import chat_pb2
from tests.support.gateway import GatewayThread
from tests.support.raw_http2 import RawConnection
from tests.support.requests import ask, reason_of

INVALID = grpc.StatusCode.INVALID_ARGUMENT
pytestmark = pytest.mark.usefixtures("the_next_good_request_succeeds")


def test_bytes_that_are_no_message_are_an_invalid_request(gateway: GatewayThread) -> None:
    for method in chat_pb2.DESCRIPTOR.services_by_name["ChatService"].methods:
        path = f"/parley.v1.ChatService/{method.name}"
        with pytest.raises(grpc.RpcError) as raised:
            if method.server_streaming:
                list(gateway.channel.unary_stream(path)(b"\xff\xff\xff", timeout=20))
            else:
                gateway.channel.unary_unary(path)(b"\xff\xff\xff", timeout=20)
        assert (raised.value.code(), reason_of(raised.value)) == (INVALID, "INVALID_REQUEST")


@pytest.mark.parametrize(
    "method", [method.name for method in chat_pb2.DESCRIPTOR.services_by_name["ChatService"].methods]
)
@pytest.mark.parametrize("data", [None, b"\0\0\0\0\x09half"], ids=["none", "half"])
def test_a_call_without_a_message_is_an_invalid_request(
    gateway: GatewayThread, method: str, data: bytes | None
) -> None:
    with RawConnection(gateway.target) as connection:
        stream = connection.begin(method, {"x-request-id": "mine"})
        connection.send(data or b"", stream)
        trailers = connection.trailers() or {}
    assert (trailers["grpc-status"], trailers["x-request-id"]) == ("3", "mine")
    details = b64decode(trailers["grpc-status-details-bin"] + "==")
    assert b"INVALID_REQUEST" in details and b"no message" in details


@pytest.mark.parametrize("ends", ["reset", "gone", "deadline"])
def test_a_call_that_ends_before_its_message_leaves_no_trace(
    gateway: GatewayThread, ends: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with RawConnection(gateway.target) as connection:
        stream = connection.begin(extra={"grpc-timeout": "300m"} if ends == "deadline" else None)
        connection.send(b"\0\0\0\0\x09half", stream, ends=False)
        connection.receive_for(0.2)
        if ends == "reset":
            connection.http2.reset_stream(stream)
            connection.flush()
        elif ends == "gone":
            connection.reset()
        time.sleep(0.4)
    assert caplog.messages == []


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_bytes_that_ask_reflection_for_nothing_leave_no_stack_in_the_log(
    gateway: GatewayThread, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    call = gateway.channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")
    with pytest.raises(grpc.RpcError) as raised:
        next(call(iter([b"\xff\xff"]), timeout=20))
    assert raised.value.code() is INVALID
    assert caplog.messages == []


def test_a_lone_surrogate_is_undecodable(gateway: GatewayThread) -> None:
    good = ask("marker").SerializeToString()
    surrogate = good.replace(b"marker", b"\xed\xa0\x80abc")
    assert len(surrogate) == len(good)
    with pytest.raises(grpc.RpcError) as raised:
        gateway.channel.unary_unary("/parley.v1.ChatService/Generate")(surrogate, timeout=20)
    assert (raised.value.code(), reason_of(raised.value)) == (INVALID, "INVALID_REQUEST")
