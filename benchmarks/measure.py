"""Servers measured in turns: A B A B, the same requests for each within a turn, all others paused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from tqdm import tqdm

from benchmarks import workload
from benchmarks.load import Run, closed_loop, open_loop
from benchmarks.server import Server, alone
from benchmarks.workload import Request

_WARM_UP_TOKENS = 8
_WARM_UP_LIMIT_S = 20.0
_WARM_UP_SEED = 2**32


def in_turns(
    servers: Sequence[Server],
    make_requests: Callable[[int], list[Request]],
    concurrency: int,
    *,
    rounds: int,
    limit_s: float | None = None,
    is_open: bool = False,
    label: str = "",
) -> list[list[Run]]:
    """For each server its runs, one a round. `make_requests` takes a seed; the closed loop keeps `concurrency` open.

    `is_open`: requests are sent as they arrive. A run ends after `limit_s` at the latest.
    """
    for server in servers:
        warm_up = workload.fixed(_WARM_UP_SEED, concurrency, _WARM_UP_TOKENS)
        with alone(server, servers):
            asyncio.run(_run(server, warm_up, concurrency, _WARM_UP_LIMIT_S, is_open=False))
    runs: list[list[Run]] = [[] for _ in servers]
    turns = [(seed, index) for seed in range(rounds) for index in range(len(servers))]
    for seed, index in tqdm(turns, desc=label or f"c={concurrency}", unit="run", leave=False):
        with alone(servers[index], servers):
            runs[index].append(
                asyncio.run(_run(servers[index], make_requests(seed), concurrency, limit_s, is_open=is_open))
            )
    return runs


async def _run(
    server: Server, requests: Sequence[Request], concurrency: int, limit_s: float | None, *, is_open: bool
) -> Run:
    client = server.client()
    try:
        if is_open:
            return await open_loop(client, requests, limit_s)
        return await closed_loop(client, requests, concurrency, limit_s)
    finally:
        await client.close()
