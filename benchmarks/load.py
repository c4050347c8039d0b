"""Load: requests sent in a closed or an open loop, and what was seen. Standard library only, as workload.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.workload import Request


class Refused(Exception):
    """The server has no room for the request."""


class Client(Protocol):
    """One connection to a server."""

    def stream(self, request: Request) -> AsyncIterator[int]:
        """How many tokens each message of the answer brings. Raises Refused."""
        ...

    async def close(self) -> None: ...


@dataclass
class Run:
    """What one loop saw. Times in seconds; `is_cut`: it ran into its time limit, and counts up to there."""

    wall_s: float = 0.0
    num_tokens: int = 0
    num_answers: int = 0
    first_token_s: list[float] = field(default_factory=list)
    cut_first_token_s: list[float] = field(default_factory=list)  # how long those cut off had waited for theirs
    between_tokens_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    is_cut: bool = False

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.wall_s if self.wall_s else 0.0


class Clock:
    """Times one answer's tokens into a run. Tokens of one message came at equal distances."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._last = time.perf_counter()
        self._num_tokens = 0

    def saw(self, num_tokens: int) -> None:
        """That many more tokens are here."""
        if not num_tokens:
            return
        now = time.perf_counter()
        if self._num_tokens:
            self._run.between_tokens_s += [(now - self._last) / num_tokens] * num_tokens
        else:
            self._run.first_token_s.append(now - self._last)
        self._last = now
        self._num_tokens += num_tokens
        self._run.num_tokens += num_tokens

    def cut_off(self) -> None:
        """The loop ends here."""
        if not self._num_tokens:
            self._run.cut_first_token_s.append(time.perf_counter() - self._last)

    def refused(self) -> None:
        """There will be no answer."""
        self._run.refused_s.append(time.perf_counter() - self._last)

    def ended(self, wanted: int) -> None:
        """The answer is over."""
        if self._num_tokens == wanted:
            self._run.num_answers += 1
        else:
            self._run.errors.append(f"{self._num_tokens} tokens instead of {wanted}")


async def closed_loop(
    client: Client, requests: Iterable[Request], concurrency: int, limit_s: float | None = None
) -> Run:
    """Each of `concurrency` users sends its next request as soon as its last one is answered."""
    remaining = iter(requests)

    async def one_user(run: Run) -> None:
        for request in remaining:
            await _answer(client, request, run)

    return await _timed(lambda run: [one_user(run) for _ in range(concurrency)], limit_s)


async def open_loop(client: Client, requests: Sequence[Request], limit_s: float | None = None) -> Run:
    """Each request is sent at its arrival, whatever became of the others."""

    async def arrive(request: Request, run: Run) -> None:
        await asyncio.sleep(request.arrival_s)
        await _answer(client, request, run)

    return await _timed(lambda run: [arrive(request, run) for request in requests], limit_s)


async def _answer(client: Client, request: Request, run: Run) -> None:
    clock = Clock(run)
    try:
        async for num_tokens in client.stream(request):
            clock.saw(num_tokens)
    except asyncio.CancelledError:
        clock.cut_off()
        raise
    except Refused:
        clock.refused()
    except Exception as error:  # of whatever library: a peer that fails is a result
        run.errors.append(f"{type(error).__name__}: {error}"[:300])
    else:
        clock.ended(request.new_tokens)


async def _timed(users: Callable[[Run], list[Any]], limit_s: float | None) -> Run:
    run = Run()
    started = time.perf_counter()
    try:
        async with asyncio.timeout(limit_s):
            await asyncio.gather(*users(run))
    except TimeoutError:
        run.is_cut = True
    run.wall_s = time.perf_counter() - started
    return run


@dataclass
class Output:
    """What a step of a peer's engine made of one request, as ours tell it."""

    key: int
    token_ids: list[int]
    is_last: bool
    error: str | None = None


def drive(engine: Any, requests: Sequence[Any], new_tokens: int, concurrency: int) -> Run:
    """The closed loop in process: `engine` has `submit` and `step` as parleyd's engines, `requests` their `key`s.

    Raises RuntimeError where a request fails.
    """
    run = Run()
    remaining: Iterator[Any] = iter(requests)
    clocks: dict[int, Clock] = {}

    def submit_next() -> None:
        if (request := next(remaining, None)) is not None:
            clocks[request.key] = Clock(run)
            engine.submit(request)

    started = time.perf_counter()
    for _ in range(concurrency):
        submit_next()
    while clocks:
        for output in engine.step():
            if output.error:
                raise RuntimeError(output.error)
            clocks[output.key].saw(len(output.token_ids))
            if output.is_last:
                clocks.pop(output.key).ended(new_tokens)
                submit_next()
    run.wall_s = time.perf_counter() - started
    return run
