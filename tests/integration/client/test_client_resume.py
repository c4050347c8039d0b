"""Streams that break after their first message: the client goes on by itself, and its caller sees one stream."""

from __future__ import annotations

import asyncio
import threading
import time

import grpc
import pytest

from parley.v1 import chat_pb2, generation_pb2
from parley_client import (
    AsyncClient,
    Cancelled,
    Client,
    ConnectionFailed,
    DeadlineExceeded,
    Draining,
    FinishReason,
    Internal,
    QueueFull,
    Unauthenticated,
    Usage,
    WorkerLost,
    patience,
    user,
)

QUESTION = [user("Hello?")]
TEXTS = ["Hel", "lo", " ", "there"]
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture(autouse=True)
def delays(monkeypatch):
    """Without delays, unless a test sets them."""
    monkeypatch.setattr(patience, "_FIRST_DELAY_S", 0.0)


@pytest.fixture
def breaks(server):
    """The server answers in four pieces of an id each, of which each call gives so many and then fails."""

    def script(*lengths, fail=lambda context: context.abort(UNAVAILABLE, "gone")):
        lengths = iter(lengths)

        def answer(request, context):
            begin = len(request.resume.token_ids)
            assert list(request.resume.token_ids) == [*range(begin)]
            length = next(lengths, len(TEXTS))
            head = {"request_id": request.request_id or "made", "model": "scripted", "seed": 2**63}
            for index in range(begin, min(begin + length, len(TEXTS))):
                piece = chat_pb2.GenerateStreamResponse(content=TEXTS[index], token_ids=[index], **head)
                if index == len(TEXTS) - 1:
                    piece.finish_reason = generation_pb2.FINISH_REASON_STOP
                    piece.usage.CopyFrom(chat_pb2.Usage(prompt_tokens=3, completion_tokens=len(TEXTS)))
                yield piece
                head = {}
            if begin + length < len(TEXTS):
                fail(context)

        server.script["GenerateStream"] = answer

    return script


@pytest.mark.parametrize("insecure", [False, True])
def test_each_part_of_a_stream_shows_the_key_of_its_time(connect, server, breaks, insecure):
    keys = iter(["first", "second"])
    breaks(1)
    with connect(server.target, max_attempts=1, api_key=lambda: next(keys), insecure=insecure) as client:
        stream = client.stream(QUESTION)
        next(stream)
        assert server.metadata["authorization"] == "Bearer first"
        assert len(list(stream)) == len(TEXTS) - 1
        assert server.metadata["authorization"] == "Bearer second"


def test_a_key_that_fails_as_a_stream_is_taken_up_again_does_not_pass_for_an_answer_cut_short(connect, server, breaks):
    keys = iter(["first"])
    breaks(1)
    with connect(server.target, max_attempts=1, api_key=lambda: next(keys), insecure=True) as client:
        stream = client.stream(QUESTION)
        with pytest.raises(Unauthenticated):
            list(stream)
        with pytest.raises(Unauthenticated):
            next(stream)


@pytest.mark.parametrize("lengths", [(1,), (3,), (1, 1, 1), (1, 0, 0, 2)])
def test_a_stream_that_breaks_is_one_stream_to_its_caller(connect, server, breaks, lengths):
    with connect(server.target, max_attempts=1) as client:
        breaks()
        undisturbed = client.stream(QUESTION)
        expected = [piece.proto for piece in undisturbed]
        server.requests.clear()
        breaks(*lengths)
        stream = client.stream(QUESTION, temperature=0.5)
        assert [piece.proto for piece in stream] == expected
        assert stream.reply.proto == undisturbed.reply.proto
    assert stream.reply.usage == Usage(3, 4, 0)
    first, *others = server.requests
    assert len(others) == len(lengths)
    assert not first.resume.token_ids and not first.generation_config.HasField("seed")
    for request in others:
        assert (request.request_id, request.model, request.generation_config.seed) == ("made", "scripted", 2**63)
        assert request.generation_config.temperature == 0.5 and request.messages == first.messages


@pytest.mark.parametrize(("reason", "error"), [("WORKER_LOST", WorkerLost), ("DRAINING", Draining), ("NEW", Exception)])
def test_every_reason_to_be_unavailable_is_survived_unless_switched_off(connect, server, breaks, reason, error):
    breaks(2, fail=lambda context: server.fails(context, UNAVAILABLE, reason))
    with connect(server.target) as client:
        assert "".join(map(str, client.stream(QUESTION))) == "Hello there"
    breaks(2, fail=lambda context: server.fails(context, UNAVAILABLE, reason))
    with connect(server.target, max_resumes=0) as client:
        stream = client.stream(QUESTION)
        assert str(next(stream)) + str(next(stream)) == "Hello"
        with pytest.raises(error):
            next(stream)
    assert stream.reply.content == "Hello"


def test_other_failures_are_final(client, server, breaks):
    breaks(2, fail=lambda context: server.fails(context, grpc.StatusCode.INTERNAL, "INTERNAL"))
    with pytest.raises(Internal):
        list(client.stream(QUESTION))
    assert len(server.requests) == 1


def test_resuming_ends_after_so_many_times_without_a_piece(connect, server, breaks):
    breaks(1, 0, 0, 1, 0, 0, 0, 0)
    with connect(server.target, max_attempts=1, max_resumes=3) as client:
        stream = client.stream(QUESTION)
        with pytest.raises(ConnectionFailed, match="gone"):
            list(stream)
    assert stream.reply.content == "Hello"
    assert len(server.requests) == 1 + 3 + 3


def test_a_full_queue_is_waited_for_once_the_stream_has_begun(connect, server, breaks):
    failures = iter(["WORKER_LOST", "QUEUE_FULL", "WORKER_LOST"])

    def fail(context):
        reason = next(failures)
        code = grpc.StatusCode.RESOURCE_EXHAUSTED if reason == "QUEUE_FULL" else UNAVAILABLE
        server.fails(context, code, reason)

    with connect(server.target, max_attempts=1) as client:
        breaks(1, 0, 2, fail=fail)
        assert "".join(map(str, client.stream(QUESTION))) == "Hello there"
        failures = iter(["QUEUE_FULL"])
        breaks(0, fail=fail)
        with pytest.raises(QueueFull):
            list(client.stream(QUESTION))


def test_several_answers_are_not_resumed(client, server, breaks):
    breaks(1)
    with pytest.raises(ConnectionFailed):
        list(client.stream(QUESTION, num_return_sequences=2))
    assert len(server.requests) == 1


def test_a_server_that_cannot_resume_does_not_hide_the_break(client, server, breaks):
    breaks(1)
    answer = server.script["GenerateStream"]

    def refuse_to_resume(request, context):
        if request.HasField("resume"):  # as where the model's default is several answers
            server.fails(context, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        yield from answer(request, context)

    server.script["GenerateStream"] = refuse_to_resume
    with pytest.raises(ConnectionFailed, match="gone"):
        list(client.stream(QUESTION))


def test_a_server_that_cannot_resume_does_not_hide_the_first_break_behind_a_later_one(connect, server, breaks):
    breaks(1)
    answer = server.script["GenerateStream"]
    refusals = iter([(UNAVAILABLE, "NOT_READY"), (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")])

    def refuse_to_resume(request, context):
        if request.HasField("resume"):
            server.fails(context, *next(refusals))
        yield from answer(request, context)

    server.script["GenerateStream"] = refuse_to_resume
    with connect(server.target, max_attempts=1) as client, pytest.raises(ConnectionFailed, match="gone"):
        list(client.stream(QUESTION))


def test_a_server_that_cannot_resume_does_not_hide_a_break_behind_one_that_was_mended(client, server, breaks):
    texts = iter(["first", "second"])
    breaks(1, 1, fail=lambda context: context.abort(UNAVAILABLE, next(texts)))
    answer = server.script["GenerateStream"]

    def refuse_to_resume_twice(request, context):
        if len(request.resume.token_ids) == 2:
            server.fails(context, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        yield from answer(request, context)

    server.script["GenerateStream"] = refuse_to_resume_twice
    with pytest.raises(ConnectionFailed, match="second"):
        list(client.stream(QUESTION))


def test_what_was_resumed_by_the_caller_is_resumed_with_all_ids(client, server, breaks):
    breaks(1)
    stream = client.stream(QUESTION, resume=[0, 1], seed=4)
    assert "".join(map(str, stream)) == " there"
    assert [list(request.resume.token_ids) for request in server.requests] == [[0, 1], [0, 1, 2]]


def test_a_call_that_breaks_after_its_last_message_has_ended_well(client, server, breaks):
    breaks()
    answer = server.script["GenerateStream"]

    def break_late(request, context):
        yield from answer(request, context)
        context.abort(UNAVAILABLE, "too late")

    server.script["GenerateStream"] = break_late
    stream = client.stream(QUESTION)
    assert "".join(map(str, stream)) == "Hello there"
    assert stream.reply.finish_reason is FinishReason.STOP
    assert len(server.requests) == 1


def test_the_timeout_is_that_of_all_calls_together(connect, server, breaks, monkeypatch):
    monkeypatch.setattr(patience, "_FIRST_DELAY_S", 0.05)
    breaks(1, *[0] * 1000)
    with connect(server.target, max_attempts=1, max_resumes=1000) as client, pytest.raises(DeadlineExceeded):
        list(client.stream(QUESTION, timeout=0.5))


def test_cancelling_a_stream_that_waits_to_be_resumed_ends_it_at_once(server, breaks, monkeypatch):
    monkeypatch.setattr(patience, "_FIRST_DELAY_S", 60.0)
    monkeypatch.setattr(patience, "_MAX_DELAY_S", 60.0)
    breaks(1)
    with Client(server.target) as client:
        stream = client.stream(QUESTION)
        next(stream)
        threading.Timer(0.2, stream.cancel).start()
        started = time.monotonic()
        with pytest.raises(Cancelled):
            next(stream)
    assert time.monotonic() - started < 30
    assert len(server.requests) == 1


@pytest.mark.parametrize("whose", [["stream"], ["task"], ["stream", "task"]], ids="-".join)
async def test_cancelling_an_async_stream_that_waits_to_be_resumed_ends_it_at_once(server, breaks, monkeypatch, whose):
    monkeypatch.setattr(patience, "_FIRST_DELAY_S", 60.0)
    monkeypatch.setattr(patience, "_MAX_DELAY_S", 60.0)
    breaks(1)
    async with AsyncClient(server.target) as client:
        stream = client.stream(QUESTION)
        await anext(stream)
        waiting = asyncio.create_task(anext(stream))
        started = time.monotonic()
        await asyncio.sleep(0.2)
        for each in whose:
            {"stream": stream, "task": waiting}[each].cancel()
        with pytest.raises(asyncio.CancelledError if "task" in whose else Cancelled):
            await waiting
    assert time.monotonic() - started < 30
    assert len(server.requests) == 1


def test_impossible_numbers_of_resumes_are_refused(connect):
    with pytest.raises(ValueError, match="max_resumes must be 0 or more"):
        connect("localhost:1", max_resumes=-1)
