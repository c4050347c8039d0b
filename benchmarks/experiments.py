"""Single questions about the service, each answered by one function with one row: what a limit or a promise costs.

A row's `experiment` names it, and `value` is what the target is held against.
"""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from benchmarks import workload
from benchmarks.clients import GrpcClient
from benchmarks.load import Clock, Run, closed_loop, open_loop
from benchmarks.measure import in_turns
from benchmarks.server import Server, serving
from benchmarks.summary import Row, percentile, ratio, summarise

_QUIET = ["--log-level", "warning"]
_SEED = 77
_PREFIX_LIMIT_S = 15.0
_MIB = 2**20
# The service takes 4,096 at most.
_STREAMS_PER_CONNECTION = 2500
_MAX_PROMPT_TOKENS = 200


def start(rounds: int = 3) -> list[Row]:
    """From the process's start to SERVING, the converted model in the cache; memory in bfloat16, under 16 streams."""
    seconds = []
    for _ in tqdm(range(rounds), desc="start", unit="start", leave=False):
        with serving(_QUIET) as server:
            seconds.append(server.start_s)
    with serving([*_QUIET, "--no-four-bit-linear"]) as server:
        in_turns([server], lambda seed: workload.fixed(seed, 64, 32), 16, rounds=1, limit_s=10)
        mib = server.memory_bytes() / _MIB
    row = {"experiment": "start", "value": round(statistics.median(seconds), 2), "unit": "s", "rounds": seconds}
    return [row, {"experiment": "memory", "value": round(mib), "unit": "MiB"}]


def prefix(server: Server, rounds: int = 2, num_users: int = 16) -> list[Row]:
    """TTFT after a system prompt of 1,000 tokens that others have sent before, against one that nobody has."""
    label = "shared prefix"
    cold = in_turns(
        [server],
        lambda seed: workload.shared_prefix(1000 + seed, num_users, 4, is_shared=False),
        1,
        rounds=rounds,
        limit_s=_PREFIX_LIMIT_S,
        label=label,
    )[0]
    shared = in_turns(
        [server],
        lambda seed: workload.shared_prefix(_SEED, 1 + num_users, 4, is_shared=True),
        1,
        rounds=rounds,
        limit_s=_PREFIX_LIMIT_S,
        label=label,
    )[0]
    shared_s = [value for run in shared for value in run.first_token_s[1:]]  # the first one may be cold
    cold_s = [value for run in cold for value in run.first_token_s]
    value = statistics.median(shared_s) / statistics.median(cold_s)
    return [
        {
            "experiment": "shared prefix",
            "value": round(value, 3),
            "ttft_shared_p50_ms": round(1000 * statistics.median(shared_s), 1),
            "ttft_cold_p50_ms": round(1000 * statistics.median(cold_s), 1),
        }
    ]


def interference(server: Server, duration_s: float = 20.0, streams: int = 8, arrivals_per_s: float = 0.5) -> list[Row]:
    """Inter-token latency of running streams while prompts of 1,000 tokens arrive: its p95 over its p50."""

    async def run() -> tuple[Run, Run]:
        client = server.client()
        number = max(1, round(duration_s * arrivals_per_s))
        arriving = workload.poisson(_SEED, workload.fixed(_SEED, number, 8, prompt_tokens=1000), arrivals_per_s)
        endless = workload.fixed(_SEED + 1, 10_000, 256)
        try:
            return await asyncio.gather(
                closed_loop(client, endless, streams, duration_s), open_loop(client, arriving, duration_s)
            )
        finally:
            await client.close()

    running, arrived = asyncio.run(run())
    between = running.between_tokens_s
    value = percentile(between, 95) / percentile(between, 50)
    labels = {"experiment": "prompts arriving", "server": server.name, "value": round(value, 2)}
    row = summarise({**labels, "concurrency": streams}, [running])
    return [{**row, "arrived_ttft_p50_ms": round(1000 * percentile(arrived.first_token_s, 50), 1)}]


def queue_cost(window_s: float = 8.0, streams: int = 64, num_queued: int = 10_000) -> list[Row]:
    """Tokens/s of running streams with many requests queued behind them, over those with none before and after."""
    admin_port = _free_port()
    # One client may have eight ninths of the places.
    places, tokens = 2 * num_queued, 2 * num_queued * _MAX_PROMPT_TOKENS
    limits = ["--max-queue", str(places), "--max-queue-tokens", str(tokens), "--max-running", str(streams)]
    with serving([*_QUIET, *limits, "--admin-port", str(admin_port)]) as server:
        before, queued, after, seconds = asyncio.run(
            _queue_cost(server.target, admin_port, window_s, streams, num_queued)
        )
    value = queued / statistics.mean((before, after))
    return [
        {
            "experiment": "queue",
            "value": round(value, 3),
            "num_queued": num_queued,
            "tokens_per_s": [round(rate, 1) for rate in (before, queued, after)],
            "seconds_to_queue": round(seconds, 1),
        }
    ]


async def _queue_cost(
    target: str, admin_port: int, window_s: float, streams: int, num_queued: int
) -> tuple[float, float, float, float]:
    async with _connected(target) as client, AsyncExitStack() as stack:
        running = _Streams(client, admin_port, streams, window_s)
        await running.fresh_rate(0)  # a server's first load is slower
        before = await running.fresh_rate(0)
        started = time.perf_counter()
        num_connections = -(-num_queued // _STREAMS_PER_CONNECTION)
        queueing = [await stack.enter_async_context(_connected(target)) for _ in range(num_connections)]
        waiting = workload.fixed(_SEED + 1, num_queued, 8)
        queued_tasks = [
            asyncio.create_task(_wait(queueing[index % num_connections], request))
            for index, request in enumerate(waiting)
        ]
        queued = asyncio.create_task(_until_queued(admin_port, num_queued))
        ended, _ = await asyncio.wait([queued, *queued_tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()  # raises where one of those that should wait could not
        seconds = time.perf_counter() - started
        while_queued = await running.fresh_rate(num_queued)
        await _cancel(queued_tasks)
        await _until_queued(admin_port, 0)
        after = await running.fresh_rate(0)
        await running.cancel()
    return before, while_queued, after, seconds


class _Streams:
    """Streams that run while others wait. Each window has new ones: with its context, a stream's pace changes."""

    def __init__(self, client: GrpcClient, admin_port: int, number: int, window_s: float) -> None:
        self._client = client
        self._admin_port = admin_port
        self._requests = [replace(request, priority=1) for request in workload.fixed(_SEED, number, 8000)]
        self._window_s = window_s
        self._tasks: list[asyncio.Task[None]] = []

    async def fresh_rate(self, num_queued: int) -> float:
        """Their tokens/s, with so many waiting behind them."""
        run = Run()
        fresh = [asyncio.create_task(_count(run, self._client, request)) for request in self._requests]
        if self._tasks:
            await _until_queued(self._admin_port, num_queued + len(fresh))
            await self.cancel()
        self._tasks = fresh
        while len(run.first_token_s) < len(fresh):
            await asyncio.sleep(0.1)
        return await _rate(run, self._window_s)

    async def cancel(self) -> None:
        await _cancel(self._tasks)


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _until_queued(admin_port: int, number: int) -> None:
    while await asyncio.to_thread(_queue_depth, admin_port) != number:
        await asyncio.sleep(0.5)


def _queue_depth(admin_port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{admin_port}/metrics", timeout=60) as page:
        line = next(line for line in page if line.startswith(b"parley_queue_depth "))
    return int(float(line.split()[1]))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


async def _count(run: Run, client: GrpcClient, request: workload.Request) -> None:
    """One stream, counted while it runs."""
    clock = Clock(run)
    async for num_tokens in client.stream(request):
        clock.saw(num_tokens)


async def _wait(client: GrpcClient, request: workload.Request) -> None:
    async for _ in client.stream(request):
        raise RuntimeError("a queued request ran: the streams before it ended too soon")


async def _rate(run: Run, window_s: float) -> float:
    tokens, started = run.num_tokens, time.perf_counter()
    await asyncio.sleep(window_s)
    return (run.num_tokens - tokens) / (time.perf_counter() - started)


@asynccontextmanager
async def _connected(target: str) -> AsyncIterator[GrpcClient]:
    client = GrpcClient(target)
    try:
        yield client
    finally:
        await client.close()


def served_to_engine(
    server: Server, serve: str, rounds: int = 2, concurrency: int = 64, new_tokens: int = 128
) -> list[Row]:
    """Tokens/s as served over the engine's own, in turns. `serve`: the arguments that `server` was started with."""
    number = 2 * concurrency
    served, engine = [], []
    for round_ in range(rounds):
        ours = in_turns(
            [server],
            lambda seed, first=round_: workload.fixed(first + seed, number, new_tokens),  # type: ignore[misc]
            concurrency,
            rounds=1,
            label="served",
        )
        served.append(ours[0][0].tokens_per_s)
        server.pause()
        try:
            engine.append(_offline_tokens_per_s(serve, concurrency, number, new_tokens, round_))
        finally:
            server.resume()
    labels = {"experiment": "served to engine", "value": round(ratio(served, engine), 3), "concurrency": concurrency}
    return [
        {**labels, "served": [round(value, 1) for value in served], "engine": [round(value, 1) for value in engine]}
    ]


def _offline_tokens_per_s(serve: str, concurrency: int, number: int, new_tokens: int, seed: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "offline.json"
        command = [sys.executable, "-m", "benchmarks.offline", "--rounds", "1", f"--serve={serve}"]
        options = {"concurrency": concurrency, "requests": number, "new-tokens": new_tokens, "seed": seed}
        command += [f"--{name}={value}" for name, value in options.items()]
        subprocess.run([*command, "--json", str(result)], check=True, capture_output=True)
        return float(json.loads(result.read_text())["rows"][0]["tokens_per_s"])


def memory_growth(num_requests: int = 300, rounds: int = 3) -> list[Row]:
    """How much memory all processes gain a request, once a small KV cache has been filled for the first time."""
    with serving([*_QUIET, "--kv-cache-memory", "0.2"]) as server:
        sizes = []
        for round_ in tqdm(range(rounds + 1), desc="memory", unit="round", leave=False):
            requests = workload.fixed(_SEED + round_, num_requests, 16)
            in_turns([server], lambda _, requests=requests: requests, 16, rounds=1)  # type: ignore[misc]
            sizes.append(server.memory_bytes())
    per_request = (sizes[-1] - sizes[1]) / (num_requests * (rounds - 1))
    mib = [round(size / _MIB, 1) for size in sizes]
    return [{"experiment": "memory growth", "value": round(per_request / 1024, 2), "unit": "KiB a request", "mib": mib}]
