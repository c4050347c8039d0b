"""Goes on with an answer whose stream broke: what to ask for next, and when. Both clients' streams use it."""

from __future__ import annotations

from typing import Any

from parley.v1 import chat_pb2
from parley_client.accumulator import Accumulator
from parley_client.errors import InvalidRequest, ParleyError
from parley_client.patience import Patience


class Resumption:
    """The calls of one stream: the first, and those that take the answer up where the one before broke off.

    Any server of the same model can go on: it is told the seed and the ids that are here. What it sends begins behind
    them, so the pieces of all calls together are those of an unbroken one.
    """

    def __init__(self, accumulator: Accumulator, patience: Patience) -> None:
        self._accumulator = accumulator
        self._patience = patience
        self._break: ParleyError | None = None

    def note_progress(self) -> None:
        """To be called with each piece."""
        self._break = None
        self._patience.note_progress()

    def delay_after(self, error: ParleyError) -> float:
        """In how many seconds to go on.

        Raises:
            ParleyError: that would not help.
        """
        delay_s = self._delay_after(error)
        if delay_s is None:
            raise self._final(error)
        if self._accumulator.has_begun and self._break is None:
            self._break = error
        return delay_s

    def call_args(self) -> dict[str, Any]:
        """Keyword arguments of the next call."""
        return self._patience.call_args()

    def request(self) -> chat_pb2.GenerateRequest:
        """The request for what is still missing."""
        return self._accumulator.remainder()

    def _delay_after(self, error: ParleyError) -> float | None:
        if not self._accumulator.has_begun:
            return self._patience.delay_before_again(error)
        return self._patience.delay_after(error) if self._accumulator.can_resume else None

    def _final(self, error: ParleyError) -> ParleyError:
        # Where the number of answers is left to the model's defaults, only the server knows that it cannot resume.
        return self._break if self._break is not None and isinstance(error, InvalidRequest) else error
