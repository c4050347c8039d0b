"""`generate_batch` of both clients, against a server that answers by script."""

from __future__ import annotations

import time
from contextlib import closing
from types import SimpleNamespace

import grpc
import pytest

from parley_client import (
    IncompleteStream,
    InvalidRequest,
    ParleyError,
    QueueFull,
    Unsupported,
    chat_request,
    patience,
    user,
)
from tests.integration.client.conftest import PATIENCE_S
from tests.support.batch_answers import answered, failed


def test_results_come_with_their_index_in_the_order_of_the_server(server, client):
    server.script["GenerateBatch"] = lambda request, context: iter(
        [answered(1, "one"), failed(0, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", 1.5), answered(2, "two")]
    )
    first, second, third = client.generate_batch([[user("0")], [user("1")], [user("2")]])
    assert (first.index, first.reply.content, first.error) == (1, "one", None)
    assert (third.index, third.reply.content) == (2, "two")
    assert isinstance(second.error, QueueFull)
    assert second.error.retry_after_s == 1.5
    with pytest.raises(QueueFull, match="as scripted"):
        _ = second.reply


def test_options_are_for_conversations_and_requests_keep_their_own(echoes, client):
    items = [[user("a")], chat_request([user("b")], max_new_tokens=7, request_id="mine")]
    assert len(list(client.generate_batch(items, max_new_tokens=3, timeout=20))) == 2
    sent = echoes.requests[-1].requests
    assert [item.generation_config.max_new_tokens for item in sent] == [3, 7]
    assert sent[1].request_id == "mine"


def test_an_item_that_cannot_be_encoded_is_named(client):
    with pytest.raises(InvalidRequest) as raised:
        client.generate_batch([[user("a")], [user("b"), user("\ud800")]])
    assert [violation.field for violation in raised.value.violations] == ["requests[1].messages[1].content"]


def test_a_batch_that_ends_too_soon_is_an_error(server, client):
    server.script["GenerateBatch"] = lambda request, context: iter([answered(0)])
    results = client.generate_batch([[user("a")], [user("b")]])
    assert next(results).index == 0
    with pytest.raises(IncompleteStream):
        next(results)


def test_a_batch_that_breaks_after_its_last_result_has_ended_well(server, client):
    def break_late(request, context):
        yield answered(0)
        context.abort(grpc.StatusCode.UNAVAILABLE, "too late")

    server.script["GenerateBatch"] = break_late
    assert [result.index for result in client.generate_batch([[user("a")]])] == [0]


def test_a_batch_outlasts_refusals_and_has_its_time_from_when_it_is_begun(server, client, monkeypatch):
    left = []

    def refuse_twice(request, context):
        left.append(context.time_remaining())
        if len(server.requests) < 3:
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
        return iter([answered(0)])

    clock = SimpleNamespace(monotonic=time.monotonic)
    monkeypatch.setattr(patience, "time", clock)
    server.script["GenerateBatch"] = refuse_twice
    results = client.generate_batch([[user("a")]], timeout=PATIENCE_S)
    clock.monotonic = lambda: time.monotonic() + PATIENCE_S
    assert [result.index for result in results] == [0]
    assert len(left) == 3 and min(left) > 1


def test_a_call_that_fails_as_a_whole_raises(server, client):
    def fail(request, context):
        server.fails(context, grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED")
        yield

    server.script["GenerateBatch"] = fail
    with pytest.raises(Unsupported):
        list(client.generate_batch([[user("a")]]))


def test_leaving_a_batch_early_cancels_the_call(server, client):
    def answer(request, context):
        yield answered(0)
        server.hold(context)

    server.script["GenerateBatch"] = answer
    with closing(client.generate_batch([[user("a")], [user("b")]])) as results:
        next(results)
    assert server.has_seen_the_end()


##### parley batch


def test_an_error_class_of_an_item_is_the_one_chat_would_raise(server, client):
    server.script["GenerateBatch"] = lambda request, context: iter([failed(0, grpc.StatusCode.ABORTED, "NEW_REASON")])
    (result,) = client.generate_batch([[user("a")]])
    assert type(result.error) is ParleyError
    assert (result.error.reason, result.error.code) == ("NEW_REASON", grpc.StatusCode.ABORTED)
