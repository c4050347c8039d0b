"""A client that was closed tells so, whatever is called and whenever it was closed."""

from __future__ import annotations

import asyncio
import threading
import time

import grpc
import pytest

from parley.v1 import chat_pb2
from parley_client import AsyncClient, Cancelled, Client, patience, user

QUESTION = [user("Hello?")]


def break_off(request, context):
    yield chat_pb2.GenerateStreamResponse(content="Hello", token_ids=[1], request_id="request-1")
    context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("chat", [QUESTION]),
        ("stream", [QUESTION]),
        ("generate_batch", [[QUESTION]]),
        ("count_tokens", [QUESTION]),
        ("model_info", []),
        ("health", []),
        ("wait_until_ready", []),
    ],
)
def test_every_call_of_a_closed_client_raises_cancelled(client, method, args):
    client.close()
    with pytest.raises(Cancelled, match="the client was closed"):
        list(getattr(client, method)(*args))


@pytest.mark.parametrize("method", ["chat", "stream"])
def test_a_client_that_is_closed_just_before_a_call_is_made_again_raises_cancelled(server, method):
    server.script["GenerateStream"] = break_off
    server.script["Generate"] = lambda request, context: server.fails(context, grpc.StatusCode.UNAVAILABLE, "NOT_READY")

    def api_key():  # is asked for between the pause and the next call
        if server.requests:
            client.close()
        return "key"

    client = Client(server.target, api_key=api_key, insecure=True, max_attempts=1)
    with pytest.raises(Cancelled, match="the client was closed"):
        list(getattr(client, method)(QUESTION))
    assert len(server.requests) == 1


@pytest.fixture
def breaks_for_long(server, monkeypatch):
    """Streams break after a piece, and are to be resumed in a minute."""
    monkeypatch.setattr(patience, "_FIRST_DELAY_S", 60.0)
    monkeypatch.setattr(patience, "_MAX_DELAY_S", 60.0)
    server.script["GenerateStream"] = break_off


def test_closing_the_client_ends_the_wait_of_a_stream_that_is_to_be_resumed(server, breaks_for_long):
    client = Client(server.target)
    stream = client.stream(QUESTION)
    next(stream)
    threading.Timer(0.2, client.close).start()
    started = time.monotonic()
    with pytest.raises(Cancelled, match="the client was closed"):
        next(stream)
    assert time.monotonic() - started < 30


async def test_closing_the_async_client_ends_the_wait_of_a_stream_that_is_to_be_resumed(server, breaks_for_long):
    client = AsyncClient(server.target)
    stream = client.stream(QUESTION)
    await anext(stream)
    waiting = asyncio.create_task(anext(stream))
    await asyncio.sleep(0.2)
    await client.close()
    with pytest.raises(Cancelled, match="the client was closed"):
        async with asyncio.timeout(30):
            await waiting
