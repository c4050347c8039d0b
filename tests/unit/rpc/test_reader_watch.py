"""How long a client may take to read."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
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


class ContextCancelledToo:
    """Its client reads nothing, and is gone as it is cut off."""

    async def write(self, response: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            current = asyncio.current_task()
            assert current is not None
            current.cancel()
            raise


async def test_who_is_cancelled_as_he_is_cut_off_is_cancelled_and_forgotten() -> None:
    context: Any = ContextCancelledToo()
    watch = ReaderWatch(0.1)
    task = asyncio.create_task(watch.write(context, chat_pb2.GenerateStreamResponse()))
    await asyncio.wait([task])
    assert task.cancelled()
    gone = weakref.ref(task)
    del task
    gc.collect()
    assert gone() is None
