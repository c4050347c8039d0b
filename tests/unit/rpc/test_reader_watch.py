"""How long a client may take to read."""

from __future__ import annotations

import asyncio
import time
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


async def test_a_time_in_which_we_were_stopped_ourselves_is_nobodys() -> None:
    context: Any = SlowContext(0.2)
    asyncio.get_running_loop().call_later(0.1, time.sleep, 1.0)
    await ReaderWatch(0.8).write(context, chat_pb2.GenerateStreamResponse(content="x"))
