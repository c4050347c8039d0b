"""One request's way back: token ids from the worker, waiting for the handler that answers its client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from parleyd.errors import EngineFault, InvalidRequest, ParleyError, Violation
from parleyd.generation import FinishReason, Output, TokenLogprob
from parleyd.ipc.messages import decode_logprob, encode

# Ids in a message; many clients take none of more than 4 MiB. With 20 log-probabilities each they take 40 times as long
# to put into it, while all other streams wait.
_MAX_IDS, _MAX_IDS_WITH_LOGPROBS = 256, 32


@dataclass(frozen=True)
class Delta:
    """Token ids made since the last delta, and their log-probabilities where asked for; the last one has a
    `finish_reason`. `made_at`, on the monotonic clock: when the newest output was here, however late it is taken."""

    token_ids: list[int]
    finish_reason: FinishReason | None
    cached_prompt_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    made_at: float = 0.0


class Streamer:
    """Collects a request's outputs. What a slow reader has not taken is merged, so at most one answer waits here."""

    def __init__(
        self, on_end: Callable[[], None] = lambda: None, grammar_field: str = "", *, interval: int = 1
    ) -> None:
        """`on_end` is called when nothing more will come, whether or not what came has been taken. `grammar_field` is
        the request's that has the grammar, if any has. `interval`: ids that deltas wait for, all but the first and the
        last."""
        self._on_end = on_end
        self._grammar_field = grammar_field
        self._interval = interval
        self._token_ids: list[int] = []
        self._logprobs: list[bytes] = []  # of an answer that nobody reads, a sixth of the memory of objects
        self._finish_reason: FinishReason | None = None
        self._error: ParleyError | None = None
        self._cached_prompt_tokens: int | None = None
        self._made_at = 0.0
        self._news = asyncio.Event()

    def put(self, output: Output) -> None:
        """Adds what one step made."""
        self._token_ids.extend(output.token_ids)
        self._logprobs.extend(map(encode, output.logprobs))
        self._finish_reason = output.finish_reason
        self._made_at = time.monotonic()
        is_first = self._cached_prompt_tokens is None
        if is_first:  # what a later worker finds cached saves what was already done
            self._cached_prompt_tokens = output.cached_prompt_tokens
        if output.error is not None:
            self._error = EngineFault(output.error)
        elif output.grammar_error is not None:
            self._error = InvalidRequest([Violation(self._grammar_field, output.grammar_error)])
        if is_first or output.is_last or len(self._token_ids) >= self._interval:
            self._news.set()
        if output.is_last:
            self._on_end()

    def fail(self, error: ParleyError) -> None:
        """Ends the request; ids already here are still handed out before the error is raised."""
        if self._finish_reason is None and self._error is None:
            self._error = error
            self._news.set()
            self._on_end()

    async def take(self) -> Delta:
        """The ids not yet taken, as many as a message may hold, at least one unless the request ended; raises the error
        that ended it."""
        await self._news.wait()
        self._news.clear()
        if self._error is not None and not self._token_ids:
            raise self._error
        num_ids = _MAX_IDS_WITH_LOGPROBS if self._logprobs else _MAX_IDS
        token_ids, self._token_ids = self._token_ids[:num_ids], self._token_ids[num_ids:]
        logprobs, self._logprobs = self._logprobs[:num_ids], self._logprobs[num_ids:]
        is_all = not self._token_ids
        if not is_all or self._error is not None:
            self._news.set()
        finish_reason = self._finish_reason if is_all else None
        return Delta(
            token_ids,
            finish_reason,
            self._cached_prompt_tokens or 0,
            [*map(decode_logprob, logprobs)],
            self._made_at,
        )
