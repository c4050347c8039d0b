"""`parley batch`: answers a file of requests into a file of results, and goes on where an earlier run stopped."""

from __future__ import annotations

import asyncio
import math
import os
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

from parley_client import commands
from parley_client.aio import AsyncClient
from parley_client.batch_files import BadFile, Item, ResultFile, check_input, read_items
from parley_client.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    MessageTooLarge,
    ParleyError,
    QueueFull,
    Unavailable,
)
from parley_client.reply import Reply

_OPEN_CALLS = 2  # so that the next items are queued while the last ones of a call finish
_MAX_CALL_BYTES = 3 * 1024 * 1024  # servers take 4 MiB unless told otherwise
_MAX_ITEM_TRIES = 4  # of an item whose server went away under it
_MAX_CALL_TRIES = 7  # in a row that break off without any result, over about a minute
_FIRST_DELAY_S, _MAX_DELAY_S = 1.0, 30.0
_REPORT_INTERVAL_S = 0.2
_USUAL_WIDTH = 80  # of terminals that do not know theirs


def batch(args: Namespace) -> int:
    """`parley batch INPUT OUTPUT`; the exit code is 0 only if every item has been answered."""
    try:
        keys = check_input(args.input)
        with ResultFile(args.output, keys) as results:
            report = Report(total=len(keys), answered=len(results.answered))
            try:
                asyncio.run(_run(args, results, report))
            finally:
                report.end()
    except BadFile as error:
        for line in str(error).splitlines():
            print("parley: error:", commands.shown(line, sys.stderr), file=sys.stderr)
        return 1
    return 0 if report.answered == report.total else 1


async def _run(args: Namespace, results: ResultFile, report: Report) -> None:
    async with AsyncClient(**commands.connection(args)) as client:
        items = (item for item in read_items(args.input) if item.key not in results.answered)
        job = BatchJob(client, items, results, report, args.chunk)
        await asyncio.gather(*(job.work() for _ in range(_OPEN_CALLS)))


class BatchJob:
    """Asks for all items in calls of up to `chunk_size`, and again for those that the server had no room for."""

    def __init__(
        self, client: AsyncClient, items: Iterator[Item], results: ResultFile, report: Report, chunk_size: int
    ) -> None:
        self._client = client
        self._items = items
        self._results = results
        self._report = report
        self._chunk_size = chunk_size
        self._max_call_bytes = _MAX_CALL_BYTES
        self._has_contact = False

    async def work(self) -> None:
        """Makes one call after the other until no items are left. Several may work at once.

        Raises:
            ParleyError: asking again would not help, or has not helped.
        """
        again: deque[Item] = deque()
        failures = 0
        while chunk := self._take(again):
            unanswered = dict(enumerate(chunk))
            try:
                delay_s = await self._ask(chunk, unanswered, again)
                failures = 0
            except Unavailable as error:
                failures = failures + 1 if len(unanswered) == len(chunk) else 1
                delay_s = self._after_break(error, failures)
            except (QueueFull, DeadlineExceeded, MessageTooLarge) as error:
                failures = 0
                delay_s = self._after_refusal(error, unanswered)
            again.extendleft(reversed(unanswered.values()))
            if again:
                await asyncio.sleep(delay_s)

    def _take(self, again: deque[Item]) -> list[Item]:
        chunk: list[Item] = []
        num_bytes = 0
        while len(chunk) < self._chunk_size:
            item = again.popleft() if again else next(self._items, None)
            if item is None:
                break
            num_bytes += item.request.ByteSize()
            if chunk and num_bytes > self._max_call_bytes:
                again.appendleft(item)
                break
            chunk.append(item)
        return chunk

    async def _ask(self, chunk: list[Item], unanswered: dict[int, Item], again: deque[Item]) -> float:
        """Makes one call. Items to be asked again go into `again`; returns in how many seconds that makes sense."""
        ready = time.monotonic()
        async with aclosing(self._client.generate_batch([item.request for item in chunk])) as results:
            async for result in results:
                self._has_contact = True
                item = unanswered.pop(result.index)
                if result.error is not None and _is_worth_another_try(item, result.error):
                    ready = max(ready, time.monotonic() + (result.error.retry_after_s or _FIRST_DELAY_S))
                    again.append(item)
                else:
                    self._finish(item, result.outcome)
        return max(0.0, ready - time.monotonic())

    def _after_break(self, error: Unavailable, failures: int) -> float:
        """In how many seconds to ask again, after so many calls in a row without an answer. Raises what is final."""
        self._has_contact = self._has_contact or not isinstance(error, ConnectionFailed)
        if not self._has_contact or failures >= _MAX_CALL_TRIES:  # without any, the target is likely wrong
            raise error
        backoff_s: float = min(_FIRST_DELAY_S * 2 ** (failures - 1), _MAX_DELAY_S)
        return max(error.retry_after_s or 0.0, backoff_s)

    def _after_refusal(self, error: ParleyError, unanswered: dict[int, Item]) -> float:
        """Deals with a call that the server refused, or ended, as a whole; returns in how many seconds to go on."""
        if isinstance(error, QueueFull):
            self._has_contact = True
            return error.retry_after_s or _FIRST_DELAY_S
        if isinstance(error, MessageTooLarge) and len(unanswered) > 1:
            self._max_call_bytes = sum(item.request.ByteSize() for item in unanswered.values()) // 2
            return 0.0
        for item in unanswered.values():
            self._finish(item, error)
        unanswered.clear()
        return 0.0

    def _finish(self, item: Item, outcome: Reply | ParleyError) -> None:
        if isinstance(outcome, ParleyError):
            self._results.write(item, {"error": _error_to_json(outcome)})
            self._report.add_failure()
        else:
            self._results.write(item, {"response": commands.to_json(outcome.proto)})
            self._report.add_answer(outcome.proto.usage.completion_tokens)


def _is_worth_another_try(item: Item, error: ParleyError) -> bool:
    if isinstance(error, QueueFull):
        return True  # for as long as it takes: the server is well, and busy
    item.tries += 1
    return isinstance(error, Unavailable) and item.tries < _MAX_ITEM_TRIES


def _error_to_json(error: ParleyError) -> dict[str, Any]:
    return {
        "code": error.code.name,
        "reason": error.reason,
        "message": error.message,
        "metadata": error.metadata,
        "violations": [{"field": v.field, "description": v.description} for v in error.violations],
    }


class Report:
    """How far a job is, on stderr: a line that is written over on a terminal, one line at the end elsewhere."""

    def __init__(self, total: int, answered: int) -> None:
        self.total = total
        self.answered = answered
        self._failed = 0
        self._tokens = 0
        self._started = time.monotonic()
        self._shown = -math.inf
        self._is_terminal = sys.stderr.isatty()
        self._show()  # the first answer may take long

    def add_answer(self, num_tokens: int) -> None:
        self.answered += 1
        self._tokens += num_tokens
        self._show()

    def add_failure(self) -> None:
        self._failed += 1
        self._show()

    def end(self) -> None:
        """Tells the final state."""
        print(f"\r{self}\033[K" if self._is_terminal else self, file=sys.stderr)

    def __str__(self) -> str:
        rate = self._tokens / max(time.monotonic() - self._started, 1e-3)
        return f"{self.answered:,} of {self.total:,} answered, {self._failed:,} failed, {rate:,.0f} tokens/s"

    def _show(self) -> None:
        if self._is_terminal and time.monotonic() - self._shown > _REPORT_INTERVAL_S:
            self._shown = time.monotonic()
            # Only the last row of a line that wraps could be written over.
            width = os.get_terminal_size(sys.stderr.fileno()).columns or _USUAL_WIDTH
            print(f"\r{str(self)[: width - 1]}\033[K", end="", file=sys.stderr, flush=True)
