"""The stream object, on a call that is a stand-in."""

from __future__ import annotations

import pytest

from parley.v1 import chat_pb2
from parley_client import AsyncStream, Cancelled, Internal, Stream
from parley_client.patience import Contact, Patience

NO_PATIENCE = Patience(lambda timeout: {}, None, 0, Contact())


class InterruptedCall:
    """A call during whose wait for the next message the user presses Ctrl-C."""

    cancelled = False

    def __next__(self):
        raise KeyboardInterrupt

    def cancel(self):
        self.cancelled = True


def test_ctrl_c_while_waiting_for_a_piece_cancels_the_call_at_once():
    call = InterruptedCall()
    stream = Stream(lambda message: call, chat_pb2.GenerateRequest(), NO_PATIENCE)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    # The stream is still referred to: it is not the garbage collector that ended the call.
    assert call.cancelled
    with pytest.raises(Cancelled):
        next(stream)


class UnreadableCall:
    """An asyncio call with an answer that cannot be decoded: gRPC gives None for it, and leaves the call open."""

    cancelled = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        return None

    def cancel(self):
        self.cancelled = True

    def done(self):
        return self.cancelled


async def test_an_answer_that_cannot_be_read_cancels_the_call_of_an_async_stream():
    call = UnreadableCall()
    stream = AsyncStream(lambda message: call, chat_pb2.GenerateRequest(), NO_PATIENCE)
    for _ in range(2):
        with pytest.raises(Internal):
            await anext(stream)
        assert call.cancelled


def test_a_stream_whose_call_could_not_be_made_is_dropped_quietly():
    def refuse(message):
        raise ValueError("the channel is closed")

    with pytest.raises(ValueError, match="closed"):
        Stream(refuse, chat_pb2.GenerateRequest(), NO_PATIENCE)
