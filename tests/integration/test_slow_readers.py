"""Clients that do not read: what waits for them is bounded, a stream at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import grpc
import psutil

from parley.v1 import chat_pb2, chat_pb2_grpc
from tests.support.requests import ask
from tests.support.watched_gateway import watched_gateway

_NUM_STREAMS = 24
_NUM_TOKENS = 2000
# Ids, text and gRPC's own buffers of one unread answer.
_KIB_PER_STREAM = 256


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


def num_ids(call: Iterable[chat_pb2.GenerateStreamResponse]) -> int:
    return sum(len(response.token_ids) for response in call)
