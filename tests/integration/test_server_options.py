"""Each option of the gRPC server takes effect: seen on raw HTTP/2 connections, against a server without the option."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import h2.events
import pytest

from parleyd.config import ServerSettings
from parleyd.gateway.options import server_options
from tests.support.raw_http2 import RawConnection, open_socket

OPTIONS = dict(server_options(ServerSettings()))
PINGS = (
    "grpc.http2.max_ping_strikes",
    "grpc.http2.min_ping_interval_without_data_ms",
    "grpc.keepalive_permit_without_calls",
)
PENDING = ("grpc.server.max_pending_requests", "grpc.server.max_pending_requests_hard_limit")


@asynccontextmanager
async def server_with(options: dict[str, int]) -> AsyncIterator[int]:
    """A server with exactly these options; its port."""

    async def echo(request: bytes, context: Any) -> bytes:
        return request

    server = grpc.aio.server(options=list(options.items()))
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("Echo", {"Echo": grpc.unary_unary_rpc_method_handler(echo)})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield port
    await server.stop(None)


def target(port: int) -> str:
    return f"127.0.0.1:{port}"


def some(*names: str) -> dict[str, int]:
    return {name: OPTIONS[name] for name in names}


def without(*names: str) -> dict[str, int]:
    return {name: value for name, value in OPTIONS.items() if name not in names}


async def is_sent_away(options: dict[str, int], *, num_pings: int, interval_s: float) -> bool:
    """Whether a client that pings without any call gets a GOAWAY."""

    def ping(port: int) -> bool:
        client = RawConnection(target(port))
        client.receive_for(0.1)
        for _ in range(num_pings):
            if sent_away(client):
                break
            client.ping()
            client.receive_for(interval_s)
        client.receive_for(0.3, until=lambda: sent_away(client))
        client.close()
        return sent_away(client)

    def sent_away(client: RawConnection) -> bool:
        return client.is_closed or client.saw(h2.events.ConnectionTerminated)

    async with server_with(options) as port:
        return await asyncio.to_thread(ping, port)


async def test_a_client_may_ping_as_it_likes() -> None:
    assert not await is_sent_away(OPTIONS, num_pings=20, interval_s=0.01)
    assert await is_sent_away(without(*PINGS), num_pings=20, interval_s=0.01)


async def test_max_ping_strikes_takes_effect() -> None:
    assert not await is_sent_away(some("grpc.http2.max_ping_strikes"), num_pings=20, interval_s=0.01)


async def test_min_ping_interval_and_permit_without_calls_take_effect() -> None:
    both = some("grpc.http2.min_ping_interval_without_data_ms", "grpc.keepalive_permit_without_calls")
    assert not await is_sent_away(both, num_pings=4, interval_s=1.05)
    assert await is_sent_away(both, num_pings=20, interval_s=0.01)
    for one in both:
        assert await is_sent_away({one: both[one]}, num_pings=4, interval_s=1.05), one


async def test_keepalive_time_takes_effect() -> None:
    assert await _pinged_by(dict(server_options(ServerSettings(keepalive_time=1))), answers=True) == (True, False)
    assert await _pinged_by(OPTIONS, answers=True) == (False, False)


async def test_keepalive_timeout_takes_effect() -> None:
    impatient = dict(server_options(ServerSettings(keepalive_time=1, keepalive_timeout=1)))
    assert await _pinged_by(impatient, answers=False) == (True, True)
    patient = dict(server_options(ServerSettings(keepalive_time=1, keepalive_timeout=20)))
    assert await _pinged_by(patient, answers=False) == (True, False)


async def _pinged_by(options: dict[str, int], *, answers: bool) -> tuple[bool, bool]:
    """Whether the server pings an idle client within 3.5 seconds, and whether it then closes the connection."""

    def idle(port: int) -> tuple[bool, bool]:
        client = RawConnection(target(port), answers_pings=answers)
        client.receive_for(3.5)
        client.close()
        return client.saw(h2.events.PingReceived), client.is_closed

    async with server_with(options) as port:
        return await asyncio.to_thread(idle, port)


@pytest.mark.parametrize("limit", [1024, 8 * 1024 * 1024])
async def test_max_receive_message_length_takes_effect(limit: int) -> None:
    options = dict(server_options(ServerSettings(max_message_bytes=limit)))
    async with server_with(options) as port, _channel(port) as channel:
        call = channel.unary_unary("/Echo/Echo")
        assert len(await call(b"x" * limit, timeout=10)) == limit
        with pytest.raises(grpc.RpcError) as raised:
            await call(b"x" * (limit + 1), timeout=10)
        assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_second_server_cannot_take_the_same_port() -> None:
    async with server_with(OPTIONS) as port:
        second = grpc.aio.server(options=list(OPTIONS.items()))
        with pytest.raises(RuntimeError):
            second.add_insecure_port(target(port))
    async with server_with(without("grpc.so_reuseport")) as port:
        second = grpc.aio.server()
        assert second.add_insecure_port(target(port)) == port  # what happens without the option


async def test_max_pending_requests_take_effect() -> None:
    assert await _num_cancelled_of_a_burst(OPTIONS) == 0
    assert await _num_cancelled_of_a_burst(without(*PENDING)) > 0  # what happens without the options


async def test_how_long_a_call_may_pend_takes_effect() -> None:
    option = "grpc.server_max_unrequested_time_in_server"
    assert OPTIONS[option] > 600
    assert await _num_cancelled_of_a_burst(OPTIONS, busy_s=3.0) == 0
    assert await _num_cancelled_of_a_burst(OPTIONS | {option: 1}, busy_s=3.0) > 0  # as without it, after 30 seconds


async def _num_cancelled_of_a_burst(options: dict[str, int], busy_s: float = 1.0) -> int:
    """Of 1,500 calls that arrive while the event loop is busy."""

    def burst(port: int) -> int:
        with grpc.insecure_channel(target(port), [("grpc.use_local_subchannel_pool", 1)]) as channel:
            grpc.channel_ready_future(channel).result(10)
            calls = [channel.unary_unary("/Echo/Echo").future(b"x", timeout=30) for _ in range(1500)]
            return sum(call.code() is grpc.StatusCode.CANCELLED for call in calls)

    async with server_with(options) as port:
        answers = asyncio.create_task(asyncio.to_thread(burst, port))
        await asyncio.sleep(0.1)
        time.sleep(busy_s)  # noqa: ASYNC251 - keeps the event loop from taking calls
        return await answers


async def test_a_connection_may_hold_so_many_streams() -> None:
    assert await _streams_allowed_by(OPTIONS) == OPTIONS["grpc.max_concurrent_streams"]
    assert await _streams_allowed_by(without("grpc.max_concurrent_streams")) > 100_000  # without the option


async def _streams_allowed_by(options: dict[str, int]) -> int:
    def settings(port: int) -> int:
        with RawConnection(target(port)) as client:
            client.receive_for(10, until=lambda: client.saw(h2.events.RemoteSettingsChanged))
            return int(client.http2.remote_settings.max_concurrent_streams)

    async with server_with(options) as port:
        return await asyncio.to_thread(settings, port)


async def test_a_connection_that_says_nothing_is_closed() -> None:
    def is_closed_in(port: int, seconds: float) -> bool:
        with open_socket(target(port), seconds) as raw:
            try:
                while raw.recv(4096):  # its settings, and then the end
                    pass
            except TimeoutError:
                return False
        return True

    async with server_with(OPTIONS | {"grpc.server_handshake_timeout_ms": 300}) as port:
        assert await asyncio.to_thread(is_closed_in, port, 5)
    async with server_with(without("grpc.server_handshake_timeout_ms")) as port:
        assert not await asyncio.to_thread(is_closed_in, port, 1)


async def test_a_connection_that_acknowledges_no_settings_is_closed() -> None:
    def is_closed(port: int) -> bool:
        with RawConnection(target(port), answers_pings=False) as client:
            client.receive_for(1)
            return client.is_closed

    async with server_with(OPTIONS | {"grpc.http2.settings_timeout": 300}) as port:
        assert await asyncio.to_thread(is_closed, port)
    async with server_with(without("grpc.http2.settings_timeout")) as port:
        assert not await asyncio.to_thread(is_closed, port)


def test_every_option_has_a_test_here() -> None:
    tested = {
        *PINGS, *PENDING, "grpc.keepalive_time_ms", "grpc.http2.ping_timeout_ms", "grpc.max_receive_message_length",
        "grpc.so_reuseport", "grpc.max_concurrent_streams", "grpc.server_handshake_timeout_ms",
        "grpc.http2.settings_timeout", "grpc.server_max_unrequested_time_in_server",
    }  # fmt: skip
    assert set(OPTIONS) == tested


def _channel(port: int) -> Any:
    return grpc.aio.insecure_channel(
        target(port), options=[("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    )
