"""A call is tried again while the server is unavailable, but never once a part of the answer has arrived."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time

import grpc
import pytest

from parley_client import (
    AsyncClient,
    Cancelled,
    Client,
    ConnectionFailed,
    DeadlineExceeded,
    InvalidRequest,
    NotReady,
    ParleyError,
    WorkerLost,
    patience,
    user,
)
from parley_client.channel import channel_options
from tests.integration.client.conftest import PATIENCE_S, serving

QUESTION = [user("Hello?")]
NO_SETTINGS = b"\0\0\0\4\0\0\0\0\0"  # HTTP/2's frame of them, with which a server begins
METHODS = pytest.mark.parametrize("method", ["chat", "stream"])


def ask(client, method):
    answer = getattr(client, method)(QUESTION)
    return "".join(str(piece) for piece in answer) if method == "stream" else answer.content


@pytest.fixture
def refuse_first(server):
    """The server refuses the first `num_refusals` calls, with `code` or by `refuse`, and then answers "Hello there"."""

    def script(num_refusals, code=grpc.StatusCode.UNAVAILABLE, refuse=None):
        refuse = refuse or (lambda context: context.abort(code, "restarting"))
        server.says("Hello", " there")

        def wrap(answer):
            def refuse_or_answer(request, context):
                if len(server.requests) <= num_refusals:
                    refuse(context)
                return answer(request, context)

            return refuse_or_answer

        for name in ("Generate", "GenerateStream"):
            server.script[name] = wrap(server.script[name])

    return script


@pytest.fixture
def without_delays(monkeypatch):
    """What the client itself tries again, it does at once."""
    monkeypatch.setattr(patience, "_FIRST_DELAY_S", 0.0)


@METHODS
def test_a_call_outlasts_two_refusals_of_an_unavailable_server(client, server, refuse_first, method):
    refuse_first(2)
    assert ask(client, method) == "Hello there"
    assert len(server.requests) == 3
    assert server.requests[0] == server.requests[2]


@METHODS
def test_retries_end(client, server, refuse_first, method):
    refuse_first(100)
    with pytest.raises(ConnectionFailed, match="restarting"):
        ask(client, method)
    assert len(server.requests) == 4


@METHODS
def test_one_attempt_is_no_retry(connect, server, refuse_first, method):
    refuse_first(1)
    with connect(server.target, max_attempts=1) as client, pytest.raises(ConnectionFailed):
        ask(client, method)
    assert len(server.requests) == 1


@pytest.fixture
def dying_target():
    """Of a server that takes one call's connection and is gone, and nobody listens after it."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = listener.accept()
        connection.sendall(NO_SETTINGS)
        received = b""
        while b"parley.v1.ChatService" not in received and (part := connection.recv(4096)):
            received += part
        listener.close()
        connection.close()

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    server.join(PATIENCE_S)


@pytest.mark.parametrize("method", ["chat", "stream", "generate_batch"])
def test_a_call_whose_server_dies_before_it_says_a_word_ends(connect, dying_target, method):
    with connect(dying_target, max_attempts=3) as client, pytest.raises(ConnectionFailed):
        list(client.generate_batch([QUESTION])) if method == "generate_batch" else ask(client, method)


def test_what_one_client_has_found_refuses_no_call_of_another(connect):
    with socket.socket() as nobody:
        nobody.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # like gRPC's servers: one may come here
        nobody.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{nobody.getsockname()[1]}"
        with connect(target, max_attempts=1) as early:
            with pytest.raises(ConnectionFailed):
                ask(early, "chat")
            with serving(target) as server, connect(target, max_attempts=1) as late:
                server.says("Hello")
                assert ask(late, "chat") == "Hello"


@pytest.fixture
def mute_target():
    """Of a server that takes connections and calls, and says nothing, to pings neither."""
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as connections:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connections.enter_context(connection).sendall(NO_SETTINGS)

        server = threading.Thread(target=serve)
        server.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        server.join(PATIENCE_S)


def test_a_call_whose_connection_has_died_without_a_word_ends(connect, mute_target, monkeypatch):
    def sooner(*args):
        return [(name, value // 30 if name.endswith("_ms") else value) for name, value in channel_options(*args)]

    for module in "client", "aio":
        monkeypatch.setattr(f"parley_client.{module}.channel_options", sooner)
    with connect(mute_target, max_attempts=1, timeout=PATIENCE_S) as client, pytest.raises(ConnectionFailed):
        client.chat(QUESTION)


@METHODS
def test_retries_keep_the_reason(connect, server, method):
    server.script["Generate"] = server.script["GenerateStream"] = lambda request, context: server.fails(
        context, grpc.StatusCode.UNAVAILABLE, "NOT_READY"
    )
    with connect(server.target, max_resumes=0) as client, pytest.raises(NotReady):
        ask(client, method)
    assert len(server.requests) == 4


@METHODS
def test_a_call_outlasts_a_server_that_takes_longer_to_be_ready(connect, server, refuse_first, without_delays, method):
    refuse_first(8, refuse=lambda context: server.fails(context, grpc.StatusCode.UNAVAILABLE, "NOT_READY"))
    with connect(server.target) as client:
        assert ask(client, method) == "Hello there"
    assert len(server.requests) == 9


@METHODS
def test_a_call_whose_server_dies_after_the_headers_is_made_again(
    connect, server, refuse_first, without_delays, method
):
    def die(context):
        context.send_initial_metadata((("x-request-id", "request-1"),))
        context.abort(grpc.StatusCode.UNAVAILABLE, "socket closed")

    refuse_first(2, refuse=die)
    with connect(server.target) as client:
        assert ask(client, method) == "Hello there"
    assert len(server.requests) == 3 and server.requests[0] == server.requests[2]


@METHODS
def test_tries_of_a_call_that_servers_take_up_end(connect, server, refuse_first, without_delays, method):
    refuse_first(100, refuse=lambda context: server.fails(context, grpc.StatusCode.UNAVAILABLE, "WORKER_LOST"))
    with connect(server.target, max_attempts=1, max_resumes=2) as client, pytest.raises(WorkerLost):
        ask(client, method)
    assert len(server.requests) == 3


@METHODS
def test_what_a_ready_server_refuses_is_told_and_not_that_it_was_not_ready(connect, server, without_delays, method):
    refusals = iter([(grpc.StatusCode.UNAVAILABLE, "NOT_READY"), (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")])
    server.script["Generate"] = server.script["GenerateStream"] = lambda request, context: server.fails(
        context, *next(refusals)
    )
    with connect(server.target, max_attempts=1) as client, pytest.raises(InvalidRequest):
        ask(client, method)


@METHODS
def test_the_timeout_is_that_of_all_tries_together(connect, server, refuse_first, method):
    refuse_first(1000, refuse=lambda context: server.fails(context, grpc.StatusCode.UNAVAILABLE, "NOT_READY"))
    with connect(server.target, timeout=0.5, max_resumes=1000) as client, pytest.raises((DeadlineExceeded, NotReady)):
        ask(client, method)


def test_closing_the_client_ends_a_call_that_waits_to_be_made_again(connect, server, refuse_first, monkeypatch):
    monkeypatch.setattr(patience, "_FIRST_DELAY_S", 60.0)
    monkeypatch.setattr(patience, "_MAX_DELAY_S", 60.0)
    refuse_first(100, refuse=lambda context: server.fails(context, grpc.StatusCode.UNAVAILABLE, "NOT_READY"))
    with Client(server.target, max_attempts=1) as client:
        threading.Timer(0.3, client.close).start()
        started = time.monotonic()
        with pytest.raises(Cancelled, match="client was closed"):
            client.chat(QUESTION)
    assert time.monotonic() - started < 30


async def test_closing_the_async_client_ends_a_call_that_waits_to_be_made_again(server, refuse_first, monkeypatch):
    monkeypatch.setattr(patience, "_FIRST_DELAY_S", 60.0)
    monkeypatch.setattr(patience, "_MAX_DELAY_S", 60.0)
    refuse_first(100, refuse=lambda context: server.fails(context, grpc.StatusCode.UNAVAILABLE, "NOT_READY"))
    async with AsyncClient(server.target, max_attempts=1) as client:
        call = asyncio.create_task(client.chat(QUESTION))
        await asyncio.sleep(0.3)
        await client.close()
        with pytest.raises(Cancelled, match="client was closed"):
            await asyncio.wait_for(call, 30)


@METHODS
@pytest.mark.parametrize(
    "code", [code for code in grpc.StatusCode if code not in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)]
)
def test_no_other_status_is_tried_again(client, server, refuse_first, method, code):
    refuse_first(1, code)
    with pytest.raises(ParleyError):
        ask(client, method)
    assert len(server.requests) == 1


def test_health_is_about_now_and_not_tried_again(client, server):
    server.script["Check"] = lambda request, context: context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
    with pytest.raises(ConnectionFailed):
        client.health()
    assert len(server.requests) == 1


@pytest.mark.parametrize("max_attempts", [0, 6])
def test_impossible_numbers_of_attempts_are_refused(connect, max_attempts):
    with pytest.raises(ValueError, match="max_attempts must be 1 to 5"):
        connect("localhost:1", max_attempts=max_attempts)


def test_a_server_that_has_answered_is_waited_for_when_it_is_gone(connect, server):
    server.says("Hello")
    answer = server.script["Generate"]
    with connect(server.target, max_attempts=1) as client:
        client.chat(QUESTION)
        gone = iter([True])
        server.script["Generate"] = lambda request, context: (
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone") if next(gone, False) else answer(request, context)
        )
        assert client.chat(QUESTION).content == "Hello"
