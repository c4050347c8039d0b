"""The stream object, on a call that is a stand-in."""

from __future__ import annotations

import pytest

from parley.v1 import chat_pb2
from parley_client import Cancelled, Stream
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


def test_a_stream_whose_call_could_not_be_made_is_dropped_quietly():
    def refuse(message):
        raise ValueError("the channel is closed")

    with pytest.raises(ValueError, match="closed"):
        Stream(refuse, chat_pb2.GenerateRequest(), NO_PATIENCE)
