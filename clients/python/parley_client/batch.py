"""The results of a batch call, one an item."""

from __future__ import annotations

from dataclasses import dataclass

from parley.v1 import chat_pb2
from parley_client import status
from parley_client.errors import IncompleteStream, ParleyError
from parley_client.reply import Reply

MAX_REQUESTS = 1024  # of one call


@dataclass(frozen=True)
class BatchResult:
    """What became of the item at `index`: a reply, or the error that `chat` would have raised for it alone."""

    index: int
    outcome: Reply | ParleyError

    @property
    def error(self) -> ParleyError | None:
        """Why the item failed; None if it was answered."""
        return self.outcome if isinstance(self.outcome, ParleyError) else None

    @property
    def reply(self) -> Reply:
        """The answer.

        Raises:
            ParleyError: the item failed.
        """
        if isinstance(self.outcome, ParleyError):
            raise self.outcome
        return self.outcome


class BatchReader:
    """Turns the messages of one call into results and knows which items still lack theirs."""

    def __init__(self, request: chat_pb2.GenerateBatchRequest) -> None:
        self.has_begun = False
        self._open = {index: item.request_id for index, item in enumerate(request.requests)}

    def read(self, response: chat_pb2.GenerateBatchResponse) -> BatchResult:
        """The result in the call's next message."""
        self.has_begun = True
        request_id = self._open.pop(response.index, None)
        if response.WhichOneof("result") == "error":
            return BatchResult(response.index, status.from_proto(response.error, request_id or None))
        return BatchResult(response.index, Reply(response.response))

    @property
    def is_whole(self) -> bool:
        """Whether every item has its result: how the call ends then says nothing more."""
        return self.has_begun and not self._open

    def check_ended(self) -> None:
        """To be called when the call has ended well.

        Raises:
            IncompleteStream: items are left without a result.
        """
        if self._open:
            raise IncompleteStream(f"the batch ended without a result for {len(self._open)} of its items")
