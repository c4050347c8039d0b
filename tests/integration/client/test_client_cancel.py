"""Whoever stops listening ends the call, so that the model does not work for nobody."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import threading
import traceback

import grpc
import pytest
from grpc_health.v1 import health_pb2

from parley.v1 import chat_pb2
from parley_client import AsyncClient, Cancelled, Client, aio, patience, user
from parley_client import client as blocking

QUESTION = [user("Hello?")]


@pytest.fixture(autouse=True)
def endless(server):
    """An answer of one piece that then waits for the client to end the call."""

    def answer(request, context):
        yield chat_pb2.GenerateStreamResponse(content="Hello", token_ids=[1], request_id="request-1")
        server.hold(context)

    server.script["GenerateStream"] = answer
    server.script["Generate"] = lambda request, context: server.hold(context)


def press_ctrl_c_within(function):
    """Sends SIGINT to the main thread once that one is waiting inside gRPC's `function`."""
    main_thread = threading.main_thread().ident
    running: set[str] = set()
    while not {function, "wait"} <= running:
        running = {frame.name for frame in traceback.extract_stack(sys._current_frames()[main_thread])}
    signal.pthread_kill(main_thread, signal.SIGINT)


def test_breaking_out_of_the_iteration_cancels_the_rpc(client, server):
    for _piece in client.stream(QUESTION):
        break
    del _piece
    gc.collect()
    assert server.has_seen_the_end()


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_closing_the_iterator_early_cancels_the_rpc(client, server, how):
    stream = client.stream(QUESTION)
    next(stream)
    getattr(stream, how)()
    assert server.has_seen_the_end()
    with pytest.raises(Cancelled) as caught:
        next(stream)
    assert caught.value.request_id == "request-1"
    assert stream.reply.content == "Hello"


def test_leaving_the_with_block_cancels_the_rpc(client, server):
    with client.stream(QUESTION) as stream:
        next(stream)
    assert server.has_seen_the_end()


def test_an_exception_in_the_loop_cancels_the_rpc(client, server):
    def stumble():
        for _ in client.stream(QUESTION):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stumble()
    gc.collect()
    assert server.has_seen_the_end()


def test_closing_the_client_cancels_the_rpc(connect, server):
    with connect(server.target) as client:
        stream = client.stream(QUESTION)
        next(stream)
        client.close()
        assert server.has_seen_the_end()
        with pytest.raises(Cancelled):
            next(stream)


def test_cancelling_a_complete_stream_changes_nothing(client, server):
    server.says("Hello", " there")
    with client.stream(QUESTION) as stream:
        assert len(list(stream)) == 2
    assert list(stream) == []
    assert stream.reply.content == "Hello there"


def test_ctrl_c_while_waiting_for_a_piece_cancels_the_rpc(server):
    first_piece_is_here = threading.Event()

    def answer(request, context):
        yield chat_pb2.GenerateStreamResponse(content="Hello", token_ids=[1])
        assert first_piece_is_here.wait(20)
        press_ctrl_c_within("_next")
        server.hold(context)

    server.script["GenerateStream"] = answer
    with Client(server.target) as client:
        stream = client.stream(QUESTION)
        with pytest.raises(KeyboardInterrupt):
            for _piece in stream:
                first_piece_is_here.set()
        # The stream is still referred to: it is the interrupt that ended the call, not the garbage collector.
        assert server.has_seen_the_end()
        assert stream.reply.content == "Hello"


def test_ctrl_c_while_waiting_for_a_whole_answer_cancels_the_rpc(server):
    def answer(request, context):
        press_ctrl_c_within("result")
        server.hold(context)

    server.script["Generate"] = answer
    with Client(server.target) as client:
        with pytest.raises(KeyboardInterrupt):
            client.chat(QUESTION)
        assert server.has_seen_the_end()


def test_another_thread_may_cancel_the_stream(server):
    with Client(server.target) as client:
        stream = client.stream(QUESTION)
        next(stream)
        canceller = threading.Thread(target=stream.cancel)
        canceller.start()
        with pytest.raises(Cancelled):
            next(stream)
        canceller.join()
        assert server.has_seen_the_end()


@pytest.mark.parametrize("method", ["chat", "stream"])
async def test_cancelling_the_task_cancels_the_rpc(server, method):
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hold(request, context):
        loop.call_soon_threadsafe(asked.set)
        server.hold(context)

    server.script["Generate"] = hold
    server.script["GenerateStream"] = lambda request, context: iter(hold(request, context) or ())

    async def ask(client):
        if method == "chat":
            await client.chat(QUESTION)
        else:
            async for _ in client.stream(QUESTION):
                pass

    async with AsyncClient(server.target) as client:
        task = asyncio.create_task(ask(client))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.has_seen_the_end)


async def test_cancelling_an_async_stream_from_another_task_raises_cancelled(server):
    async with AsyncClient(server.target) as client:
        stream = client.stream(QUESTION)
        await anext(stream)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)  # one turn of the loop: the task has begun to wait
        stream.cancel()
        with pytest.raises(Cancelled):
            await waiting
        assert await asyncio.to_thread(server.has_seen_the_end)


@pytest.mark.parametrize("how", ["cancel", "close the client"])
async def test_an_async_stream_whose_answer_is_whole_has_ended_for_whoever_waits_as_it_is_cancelled(server, how):
    server.says("Hello")
    answer = server.script["GenerateStream"]

    def answer_and_hold(request, context):
        yield from answer(request, context)
        server.hold(context)

    server.script["GenerateStream"] = answer_and_hold
    async with AsyncClient(server.target) as client:
        stream = client.stream(QUESTION)
        await anext(stream)
        waiting = asyncio.ensure_future(anext(stream, "the end"))
        await asyncio.sleep(0)  # one turn of the loop: the task has begun to wait
        if how == "cancel":
            stream.cancel()
        else:
            await client.close()
        assert await waiting == "the end"
        assert await asyncio.to_thread(server.has_seen_the_end)


@pytest.mark.parametrize("method", ["chat", "stream"])
async def test_closing_the_async_client_does_not_pass_for_the_cancellation_of_a_task(server, method):
    async with AsyncClient(server.target) as client:
        if method == "stream":
            stream = client.stream(QUESTION)
            await anext(stream)
        waiting = asyncio.ensure_future(anext(stream) if method == "stream" else client.chat(QUESTION))
        await asyncio.sleep(0)  # one turn of the loop: the task has begun to wait
        await client.close()
        with pytest.raises(Cancelled):
            await waiting


@pytest.mark.parametrize("moment", ["in a watch", "between two"])
async def test_closing_the_async_client_ends_the_wait_for_readiness(server, monkeypatch, moment):
    monkeypatch.setattr(aio, "RETRY_DELAY_S", 20)
    waiting_began = asyncio.Event()
    loop = asyncio.get_running_loop()

    def watch(request, context):
        yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
        loop.call_soon_threadsafe(waiting_began.set)
        if moment == "in a watch":
            server.hold(context)

    server.script["Watch"] = watch
    async with AsyncClient(server.target) as client:
        waiting = asyncio.create_task(client.wait_until_ready())
        await waiting_began.wait()
        if moment == "between two":
            await asyncio.to_thread(server.has_seen_the_end)
            await asyncio.sleep(0.1)
        await client.close()
        with pytest.raises(Cancelled):
            await asyncio.wait_for(waiting, 10)


@pytest.mark.parametrize("moment", ["in a watch", "between two"])
def test_closing_the_client_ends_the_wait_for_readiness(server, monkeypatch, moment):
    monkeypatch.setattr(blocking, "RETRY_DELAY_S", 20)

    def watch(request, context):
        yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
        threading.Timer(0.2, client.close).start()
        if moment == "in a watch":
            server.hold(context)

    server.script["Watch"] = watch
    client = Client(server.target)
    with pytest.raises(Cancelled):
        client.wait_until_ready(timeout=60)


async def test_breaking_out_of_an_async_iteration_cancels_the_rpc(server):
    async with AsyncClient(server.target) as client:
        async for _piece in client.stream(QUESTION):
            break
        del _piece
        assert await asyncio.to_thread(server.has_seen_the_end)


async def test_cancelling_a_task_as_the_client_is_closed_cancels_it(server, monkeypatch):
    monkeypatch.setattr(patience, "_FIRST_DELAY_S", 60.0)
    monkeypatch.setattr(patience, "_MAX_DELAY_S", 60.0)
    server.script["Generate"] = lambda request, context: server.fails(context, grpc.StatusCode.UNAVAILABLE, "NOT_READY")
    client = AsyncClient(server.target, max_attempts=1)
    waiting = asyncio.create_task(client.chat(QUESTION))
    assert await asyncio.to_thread(server.has_seen_the_end)
    await asyncio.sleep(0.2)
    closing = asyncio.create_task(client.close())
    await asyncio.sleep(0)  # one turn of the loop: it has begun
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await closing
