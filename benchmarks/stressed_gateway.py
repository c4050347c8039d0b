"""A gateway process for benchmarks/overload.py: with a worker that answers by script, so that the gateway alone is
measured, or with the embedded model; with its bookkeeping, or without."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
from prometheus_client import Counter, Histogram

from parleyd.config import ModelSettings, ServerSettings, Settings
from parleyd.gateway import admission, worker_client
from parleyd.gateway.fair_queue import Ticket, Waiter
from parleyd.gateway.server import serve
from parleyd.gateway.worker_link import WORKER_COMMAND
from parleyd.rpc.telemetry import Continuation, TelemetryInterceptor
from parleyd.telemetry import logging as telemetry_logging
from tests.support.gateway import scripted_command
from tests.support.tiny_tokenizer import write_tiny_tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--max-running", type=int, required=True)
    add("--max-queue", type=int, required=True)
    add("--step-delay", type=float, default=0.01, help="seconds between a scripted worker's steps")
    add("--real", action="store_true", help="the embedded model instead of the script")
    add("--bare", action="store_true", help="without metrics, hand-over bookkeeping and fair queue")
    arguments = parser.parse_args()
    if arguments.bare:
        strip()
    telemetry_logging.configure("warning", "text")
    server = ServerSettings(port=0, drain_delay=0.0, drain_timeout=0.0, max_queue=arguments.max_queue)
    settings = Settings(server=server, model=ModelSettings(max_running=arguments.max_running))
    with tempfile.TemporaryDirectory() as folder:
        limits = ("--max-running", str(arguments.max_running), "--step-delay", str(arguments.step_delay))
        scripted = scripted_command(write_tiny_tokenizer(Path(folder)), *limits)
        command = WORKER_COMMAND if arguments.real else scripted
        asyncio.run(serve(settings, lambda line: print(line, flush=True), command))
    return 0


def strip() -> None:
    """Takes out of this process what a request could do without if nothing ever went wrong and nobody looked."""
    client: Any = worker_client.WorkerClient
    for kind, names in (
        (client, ("_observe_start", "_observe_token")),
        (Counter, ("inc",)),
        (Histogram, ("observe",)),
    ):
        for name in names:
            setattr(kind, name, lambda *_: None)
    for module, name, stand_in in (
        (worker_client, "array", lambda _: _Nothing()),
        (admission, "FairQueue", _Line),
        (TelemetryInterceptor, "intercept_service", _pass_on),
    ):
        setattr(module, name, stand_in)


async def _pass_on(self: TelemetryInterceptor, continuation: Continuation, details: grpc.HandlerCallDetails) -> Any:
    return await continuation(details)


class _Nothing(tuple[int, ...]):
    """Keeps none of the ids that were made."""

    def extend(self, ids: Iterable[int]) -> None:
        pass


class _Line:
    """First come, first served, in the place of FairQueue."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._waiters: deque[Waiter] = deque()

    def __len__(self) -> int:
        return len(self._waiters)

    def push(self, ticket: Ticket) -> Waiter:
        waiter = Waiter(ticket, asyncio.get_running_loop().create_future(), (0, 0.0, 0))
        self._waiters.append(waiter)
        return waiter

    def first(self) -> Waiter:
        return self._waiters[0]

    def pop(self) -> Waiter:
        return self._waiters.popleft()

    def remove(self, waiter: Waiter) -> bool:
        if waiter not in self._waiters:
            return False
        self._waiters.remove(waiter)
        return True

    def to_displace(self, ticket: Ticket, max_waiters: int, max_tokens: int) -> None:
        return None

    def num_ahead(self, client: str) -> int:
        return len(self._waiters)

    def clear(self) -> Iterator[Waiter]:
        while self._waiters:
            yield self._waiters.popleft()


if __name__ == "__main__":
    sys.exit(main())
