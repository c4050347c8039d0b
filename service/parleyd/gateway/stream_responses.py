"""A stream's messages."""

from __future__ import annotations

from parley.v1 import chat_pb2
from parleyd.gateway import convert
from parleyd.gateway.answer import AnswerDelta

# A message that is cleared keeps the memory of what it has held.
_MAX_USES = 64


class StreamResponses:
    """Makes the responses of a stream; each must have been written before the next is made.

    They are one message, filled again and again: protobuf calls `malloc_trim` whenever another 10,000 have been freed,
    which holds up the event loop for as long as 40 ms.
    """

    def __init__(self) -> None:
        self._message = chat_pb2.GenerateStreamResponse()
        self._num_uses = 0

    def make(self, delta: AnswerDelta) -> chat_pb2.GenerateStreamResponse:
        """The response for one delta of a choice."""
        self._num_uses += 1
        if self._num_uses % _MAX_USES == 0:
            self._message = chat_pb2.GenerateStreamResponse()
        self._message.Clear()
        convert.fill_stream_response(self._message, delta)
        return self._message
