"""Clients that do not read, or are not there any more: what waits for them is bounded, and others go on."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import grpc
import psutil
import pytest
from h2.events import DataReceived, Event, TrailersReceived

from parley.v1 import chat_pb2, chat_pb2_grpc
from tests.integration.conftest import FOREVER, StartGateway, assert_answers
from tests.support.eventually import eventually
from tests.support.gateway import GatewayThread
from tests.support.raw_http2 import RawConnection, begin_raw_stream
from tests.support.requests import ask
from tests.support.watched_gateway import watched_gateway

_NUM_STREAMS = 24
_NUM_TOKENS = 2000
# Ids, text and gRPC's own buffers of one unread answer.
_KIB_PER_STREAM = 256
_KIB_PER_STREAM_WITH_LOGPROBS = 1024


def test_unread_streams_take_bounded_memory_and_lose_nothing(tokenizer_folder: Path) -> None:
    with (
        watched_gateway(tokenizer_folder, max_running=_NUM_STREAMS, max_queue=1) as gateway,
        grpc.insecure_channel(gateway.target) as channel,
    ):
        stub = chat_pb2_grpc.ChatServiceStub(channel)
        request = ask("!forever", max_new_tokens=_NUM_TOKENS)
        assert num_ids(stub.GenerateStream(request)) == _NUM_TOKENS  # warm-up
        before = psutil.Process(gateway.pid).memory_info().rss
        unread = [stub.GenerateStream(request) for _ in range(_NUM_STREAMS)]
        # All have a slot, and are made though nobody reads them; this one waits until they are.
        stub.Generate(ask("after"), timeout=60)
        grown_kib = (psutil.Process(gateway.pid).memory_info().rss - before) / 1024
        assert grown_kib < _NUM_STREAMS * _KIB_PER_STREAM
        assert {num_ids(call) for call in unread} == {_NUM_TOKENS}


def test_log_probabilities_that_nobody_reads_take_little_memory(tokenizer_folder: Path) -> None:
    with (
        watched_gateway(tokenizer_folder, max_running=_NUM_STREAMS, max_queue=1) as gateway,
        grpc.insecure_channel(gateway.target) as channel,
    ):
        stub = chat_pb2_grpc.ChatServiceStub(channel)
        stub.Generate(ask("x"))  # warm-up
        before = psutil.Process(gateway.pid).memory_info().rss
        connection = RawConnection(gateway.target, window=0)
        for _ in range(_NUM_STREAMS):
            connection.call("GenerateStream", ask("!forever", max_new_tokens=_NUM_TOKENS, top_logprobs=20))
        stub.Generate(ask("after"), timeout=60)  # waits until they are made
        grown_kib = (psutil.Process(gateway.pid).memory_info().rss - before) / 1024
        connection.close()
        assert grown_kib < _NUM_STREAMS * _KIB_PER_STREAM_WITH_LOGPROBS


def num_ids(call: Iterable[chat_pb2.GenerateStreamResponse]) -> int:
    return sum(len(response.token_ids) for response in call)


def test_a_reader_that_stops_reading_holds_up_nobody_and_gets_every_id(start_gateway: StartGateway) -> None:
    gateway = start_gateway(max_running=2)
    slow = gateway.stub.GenerateStream(FOREVER)
    first = next(slow)
    for i in range(20):
        assert gateway.stub.Generate(ask(f"{i}"), timeout=10).choices[0].message.content == str(i)
    ids = [*first.token_ids, *(i for response in slow for i in response.token_ids)]
    assert ids == (list(b"all work and no play ") * 200)[:4000]


def unread_stream(target: str) -> RawConnection:
    """A stream whose client grants no HTTP/2 window, so that nothing of the answer can be written."""
    return begin_raw_stream(target, "never read", window=0)


def status_in(events: Iterable[Event]) -> bytes | None:
    trailers = (dict(event.headers) for event in events if isinstance(event, TrailersReceived))
    return next((headers[b"grpc-status"] for headers in trailers), None)


def test_a_client_that_grants_no_window_keeps_no_slot(single: GatewayThread) -> None:
    with unread_stream(single.target):
        eventually(lambda: single.gateway.doorkeeper.num_open == 1)
        for _ in range(3):
            assert_answers(single)
        assert single.gateway.doorkeeper.num_open == 1  # still there, unread


def test_timings_tell_when_the_answer_was_made_not_when_it_was_read(gateway: GatewayThread) -> None:
    with RawConnection(gateway.target, window=0) as connection:
        stream = connection.call("GenerateStream", ask("hello"))
        eventually(lambda: gateway.gateway.doorkeeper.num_open == 1)
        time.sleep(2)
        connection.http2.increment_flow_control_window(2**20, stream)
        connection.flush()
        connection.receive_for(10, lambda: status_in(connection.events) is not None)
    messages = messages_in(connection.events)
    assert "".join(message.content for message in messages) == "hello"
    assert messages[-1].timings.total.ToTimedelta().total_seconds() < 2


def messages_in(events: Iterable[Event]) -> list[chat_pb2.GenerateStreamResponse]:
    data, messages = b"".join(event.data for event in events if isinstance(event, DataReceived)), []
    while data:
        end = 5 + int.from_bytes(data[1:5], "big")
        messages.append(chat_pb2.GenerateStreamResponse.FromString(data[5:end]))
        data = data[end:]
    return messages


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_a_client_that_never_reads_is_cut_off(start_gateway: StartGateway, method: str) -> None:
    gateway = start_gateway(slow_reader_timeout=0.5)
    doorkeeper = gateway.gateway.doorkeeper
    with RawConnection(gateway.target, window=0) as connection:
        asked = time.monotonic()
        connection.call(method, ask("hello"))
        eventually(lambda: doorkeeper.num_places == 1)
        eventually(lambda: doorkeeper.num_open == 0)
        assert time.monotonic() - asked > 0.5
        assert_answers(gateway)
        assert doorkeeper.num_places == 1  # gRPC keeps what was written until it is read
        connection.http2.increment_flow_control_window(2**20, 1)
        connection.flush()
        connection.receive_for(5, lambda: status_in(connection.events) is not None)
        assert status_in(connection.events) == b"8"  # RESOURCE_EXHAUSTED
        eventually(lambda: doorkeeper.num_places == 0)
    assert_answers(gateway)


def test_an_answer_that_is_never_read_gives_its_place_back_when_its_client_is_gone(start_gateway: StartGateway) -> None:
    gateway = start_gateway(slow_reader_timeout=0.5)
    doorkeeper = gateway.gateway.doorkeeper
    with unread_stream(gateway.target):
        eventually(lambda: doorkeeper.num_places == 1)
        eventually(lambda: doorkeeper.num_open == 0)
        assert doorkeeper.num_places == 1
    eventually(lambda: doorkeeper.num_places == 0)


def test_a_client_whose_host_vanished_is_let_go(start_gateway: StartGateway) -> None:
    gateway = start_gateway(keepalive_time=1, keepalive_timeout=1)
    with begin_raw_stream(gateway.target, "!wait"):  # answers no ping, and says nothing more
        eventually(lambda: gateway.gateway.worker.num_open == 1)
        gateway.wait_idle()
    assert_answers(gateway)
