"""How long a client may take to read."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from parley.v1 import chat_pb2
from parleyd.errors import SlowReader
from parleyd.rpc.reader_watch import ReaderWatch


class SlowContext:
    """Its client takes a while to read any message."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def write(self, response: Any) -> None:
        await asyncio.sleep(self._seconds)


async def test_a_long_message_may_take_as_long_as_its_length_does() -> None:
    context: Any = SlowContext(1.0)
    await ReaderWatch(0.1).write(context, chat_pb2.GenerateStreamResponse(content="x" * 64 * 1024))
    with pytest.raises(SlowReader):
        await ReaderWatch(0.1).write(context, chat_pb2.GenerateStreamResponse(content="x"))
