"""`grpc.health.v1` for those that ask or watch, and for those that watch and do not read."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2
from h2.events import DataReceived, RemoteSettingsChanged

from tests.integration.conftest import StartGateway
from tests.support.gateway import GatewayThread
from tests.support.raw_http2 import RawConnection, grpc_message

Response = health_pb2.HealthCheckResponse
SERVICES = ("", "parley.v1.ChatService")


def asks(service: str) -> bytes:
    return health_pb2.HealthCheckRequest(service=service).SerializeToString()


def unread_watch(target: str, request: bytes) -> RawConnection:
    """A client that watches and grants no HTTP/2 window, so that no status can be written to it."""
    connection = RawConnection(target, window=0)
    connection.send(grpc_message(request), connection.begin(path="/grpc.health.v1.Health/Watch"))
    connection.receive_for(10, lambda: connection.saw(RemoteSettingsChanged))
    return connection


def first_status(gateway: GatewayThread, service: str) -> int:
    watch = gateway.health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=10)
    status: int = next(watch).status
    watch.cancel()
    return status


def read_statuses(connection: RawConnection) -> list[int]:
    data = b"".join(event.data for event in connection.events if isinstance(event, DataReceived))
    message = grpc_message(Response(status=Response.SERVING).SerializeToString())
    return [Response.FromString(data[i + 5 : i + len(message)]).status for i in range(0, len(data), len(message))]


@pytest.mark.parametrize("service", SERVICES)
def test_a_watch_that_nobody_reads_keeps_no_service_from_serving(start_gateway: StartGateway, service: str) -> None:
    gateway = start_gateway(worker=("--load-delay", "1"), wait_ready=False)
    with unread_watch(gateway.target, asks(service)) as unread:
        assert {first_status(gateway, service) for service in SERVICES} == {Response.NOT_SERVING}
        gateway.wait_health(Response.SERVING)
        assert {first_status(gateway, service) for service in SERVICES} == {Response.SERVING}
        unread.http2.increment_flow_control_window(2**20, 1)
        unread.flush()
        unread.receive_for(10, lambda: len(read_statuses(unread)) == 2)
        assert read_statuses(unread) == [Response.NOT_SERVING, Response.SERVING]


@pytest.mark.parametrize("service", SERVICES)
def test_a_watch_that_nobody_reads_keeps_no_service_from_ending(start_gateway: StartGateway, service: str) -> None:
    gateway = start_gateway()
    with unread_watch(gateway.target, asks(service)):
        assert first_status(gateway, "") == Response.SERVING  # the other has arrived before
        gateway.stop()


def test_all_services_can_be_listed(start_gateway: StartGateway) -> None:
    gateway = start_gateway(worker=("--load-delay", "1"), wait_ready=False)
    for status in (Response.NOT_SERVING, Response.SERVING):
        gateway.wait_health(status)
        listed = gateway.health.List(health_pb2.HealthListRequest(), timeout=5).statuses
        assert {service: response.status for service, response in listed.items()} == dict.fromkeys(SERVICES, status)


def test_an_unknown_service_is_not_found_and_can_be_watched(gateway: GatewayThread) -> None:
    request = health_pb2.HealthCheckRequest(service="parley.v1.Else")
    with pytest.raises(grpc.RpcError) as raised:
        gateway.health.Check(request, timeout=5)
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND
    assert first_status(gateway, "parley.v1.Else") == Response.SERVICE_UNKNOWN


# A name, and a field that no health request has: kept as well.
@pytest.mark.parametrize("tag", [b"\x0a", b"\x12"], ids=["name", "else"])
def test_a_watch_that_would_keep_a_large_request_is_refused(gateway: GatewayThread, tag: bytes) -> None:
    with unread_watch(gateway.target, tag + b"\xa0\x1f" + b"x" * 4000) as connection:
        assert connection.status() == str(grpc.StatusCode.INVALID_ARGUMENT.value[0])


def test_watches_that_break_while_nobody_reads_them_leave_no_trace(
    start_gateway: StartGateway, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = start_gateway()
    unread = [unread_watch(gateway.target, asks("")) for _ in range(50)]
    assert first_status(gateway, "") == Response.SERVING  # the others have arrived before
    for connection in unread:
        connection.reset()
    gateway.stop()
    assert "Error" not in caplog.text


@pytest.mark.parametrize("method", ["Check", "Watch"])
@pytest.mark.parametrize("data", [grpc_message(b"\xff" * 10), b""], ids=["bytes", "none"])
def test_bytes_that_are_no_health_request_leave_no_trace(
    gateway: GatewayThread, method: str, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with RawConnection(gateway.target) as connection:
        connection.send(data, connection.begin(path=f"/grpc.health.v1.Health/{method}"))
        assert connection.status() == str(grpc.StatusCode.INVALID_ARGUMENT.value[0])
    assert "Error" not in caplog.text
