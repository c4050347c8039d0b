"""The service under stress: more arrivals than it can serve, very many streams, a killed worker, its own bookkeeping.

All but `recovery` run with a worker that answers by script, so that the gateway is what is measured; `--real` takes the
embedded model for `overload` and `bookkeeping`. Capacity is measured first, in the same run.

The queue holds half as many requests as run: nobody then waits for longer than half an answer takes, as some have to at
capacity too, and there is always one to take a slot that comes free. A longer queue serves no more requests under
overload, and makes all of them wait for longer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
from tqdm import tqdm

from benchmarks import workload
from benchmarks.clients import GrpcClient
from benchmarks.command import RESULTS, write_result
from benchmarks.load import Run, closed_loop, open_loop
from benchmarks.measure import in_turns
from benchmarks.server import Server, end_with_servers, serving
from benchmarks.summary import Row, percentile, ratio
from parleyd.config import ModelSettings, ServerSettings, Settings
from parleyd.gateway.worker_link import WORKER_COMMAND
from tests.support.gateway import GatewayThread
from tests.support.requests import ask

_MIB = 2**20
_OVERLOAD = 5
_NUM_SLOTS = 16
_MAX_QUEUE = _NUM_SLOTS // 2
_NEW_TOKENS = 64
_WARM_UP_S = 8.0
_WARM_UP_SEED = 10**6
_POLL_S = 0.05
# 2,000 streams that get a token every two seconds each are 1,000 messages a second.
_SLOW_STEP_S = 2.0


def overload(arguments: argparse.Namespace) -> list[Row]:
    """Arrivals at random at capacity, then at five times as many; what was accepted, and how fast the rest refused."""
    with _stressed(arguments, max_running=_NUM_SLOTS, max_queue=_MAX_QUEUE) as server:
        capacity = asyncio.run(_capacity(server, 2 * arguments.seconds))
        at_capacity, above = (
            asyncio.run(_arrivals(server, seed, factor * capacity, arguments.seconds))
            for seed, factor in enumerate((1, _OVERLOAD))
        )
    p99 = [percentile(run.first_token_s, 99) for run in (at_capacity, above)]
    row = {
        "experiment": "overload",
        "value": round(p99[1] / p99[0], 2),
        "unit": "x of the p99 TTFT at capacity",
        "worker": "embedded model" if arguments.real else "scripted",
        "capacity_answers_per_s": round(capacity, 1),
    }
    return [row, _load_row("at capacity", at_capacity), _load_row(f"{_OVERLOAD} x capacity", above)]


def streams(arguments: argparse.Namespace) -> list[Row]:
    """Very many open streams, round after round: memory of the gateway process, and how evenly tokens come."""
    number = arguments.streams
    runs, peaks_mib, idle_mib = [], [], []
    with _stressed(arguments, max_running=number, max_queue=0, step_delay_s=_SLOW_STEP_S, is_real=False) as server:
        for seed in tqdm(range(arguments.rounds), desc=f"{number} streams", unit="round", leave=False):
            run, peak = asyncio.run(_watched(server, workload.fixed(seed, number, 10), number))
            runs.append(run)
            peaks_mib.append(round(peak / _MIB, 1))
            idle_mib.append(round(psutil.Process(server.pid).memory_info().rss / _MIB, 1))
    between = [value for run in runs for value in run.between_tokens_s]
    return [
        {
            "experiment": "streams",
            "value": round(percentile(between, 99), 3),
            "unit": f"s between tokens, p99, where the worker makes one in {_SLOW_STEP_S:g} s",
            "num_streams": number,
            "itl_p50_ms": _ms(between, 50),
            "itl_p99_ms": _ms(between, 99),
            "ttft_p99_ms": _ms([value for run in runs for value in run.first_token_s], 99),
            "gateway_mib_streaming": peaks_mib,
            "gateway_mib_idle_after": idle_mib,
            **_errors(*runs),
        }
    ]


def recovery(arguments: argparse.Namespace) -> list[Row]:
    """The pause that a stream sees when its worker is killed, with the embedded model."""
    return [_pauses(spare_worker, arguments.rounds) for spare_worker in (False, True)]


def bookkeeping(arguments: argparse.Namespace) -> list[Row]:
    """Metrics, hand-over bookkeeping and fair queue against a gateway process from which they were taken."""
    limits = {"max_running": _NUM_SLOTS, "max_queue": 4 * _NUM_SLOTS}
    with _stressed(arguments, **limits) as full, _stressed(arguments, **limits, is_bare=True) as bare:
        servers = (full, bare)
        before = [_cpu_s(server) for server in servers]
        runs = in_turns(
            servers,
            lambda seed: workload.fixed(seed, 8 * _NUM_SLOTS, _NEW_TOKENS),
            2 * _NUM_SLOTS,
            rounds=arguments.rounds,
            limit_s=30.0,
            label="bookkeeping",
        )
        cpu_s = [_cpu_s(server) - earlier for server, earlier in zip(servers, before, strict=True)]
    ms_per_1000 = [1e6 * seconds / sum(run.num_tokens for run in its) for seconds, its in zip(cpu_s, runs, strict=True)]
    rates = [[run.tokens_per_s for run in its] for its in runs]
    return [
        {
            "experiment": "bookkeeping",
            "value": round(100 * (1 - ratio(*rates)), 2),
            "unit": "% of throughput",
            "worker": "embedded model" if arguments.real else "scripted",
            "tokens_per_s": [[round(rate, 1) for rate in its] for its in rates],
            "gateway_cpu_ms_per_1000_tokens": [round(value, 1) for value in ms_per_1000],
            "gateway_cpu_ratio": round(ms_per_1000[0] / ms_per_1000[1], 3),
            **_errors(*runs[0], *runs[1]),
        }
    ]


STEPS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "overload": overload,
    "streams": streams,
    "recovery": recovery,
    "bookkeeping": bookkeeping,
}


def _stressed(
    arguments: argparse.Namespace,
    *,
    max_running: int,
    max_queue: int,
    step_delay_s: float = 0.01,
    is_real: bool | None = None,
    is_bare: bool = False,
) -> AbstractContextManager[Server]:
    options = [f"--max-running={max_running}", f"--max-queue={max_queue}", f"--step-delay={step_delay_s}"]
    options += ["--real"] if (arguments.real if is_real is None else is_real) else []
    options += ["--bare"] if is_bare else []
    return serving(options, name="bare" if is_bare else "parley", program=("benchmarks.stressed_gateway",))


async def _capacity(server: Server, limit_s: float) -> float:
    """Answers a second while every slot is taken, and a request waits for each."""
    client = GrpcClient(server.target)
    number = _NUM_SLOTS + _MAX_QUEUE
    await closed_loop(client, workload.fixed(_WARM_UP_SEED, number, _NEW_TOKENS), number)
    run = await closed_loop(client, workload.fixed(_WARM_UP_SEED + 1, 6 * number, _NEW_TOKENS), number, limit_s)
    await client.close()
    return run.tokens_per_s / _NEW_TOKENS


async def _arrivals(server: Server, seed: int, per_s: float, seconds: float) -> Run:
    client = GrpcClient(server.target)
    requests = workload.poisson(seed, workload.fixed(seed, round(per_s * seconds), _NEW_TOKENS), per_s)
    run = await open_loop(client, requests)
    await client.close()
    return run


def _load_row(name: str, run: Run) -> Row:
    return {
        "arrivals": name,
        "num_accepted": run.num_answers,
        "num_refused": len(run.refused_s),
        "answers_per_s": round(run.num_answers / run.wall_s, 1),
        "ttft_p50_ms": _ms(run.first_token_s, 50),
        "ttft_p99_ms": _ms(run.first_token_s, 99),
        "itl_p99_ms": _ms(run.between_tokens_s, 99),
        "refusal_p50_ms": _ms(run.refused_s, 50),
        "refusal_p99_ms": _ms(run.refused_s, 99),
        "refusal_max_ms": _ms(run.refused_s, 100),
        "refused_within_10_ms_percent": _percent_within(run.refused_s, 0.01),
        **_errors(run),
    }


async def _watched(server: Server, requests: Sequence[workload.Request], number: int) -> tuple[Run, int]:
    """A closed loop's run, and the most memory that the gateway process had meanwhile, in bytes."""
    gateway = psutil.Process(server.pid)
    client = GrpcClient(server.target)
    peak = 0

    async def look() -> None:
        nonlocal peak
        while True:
            peak = max(peak, gateway.memory_info().rss)
            await asyncio.sleep(1.0)

    looking = asyncio.create_task(look())
    run = await closed_loop(client, requests, number)
    looking.cancel()
    await client.close()
    return run, peak


def _pauses(spare_worker: bool, rounds: int) -> Row:
    server = ServerSettings(port=0, drain_delay=0.0, drain_timeout=0.0, spare_worker=spare_worker, log_level="error")
    pauses = []
    with GatewayThread(Settings(server=server, model=ModelSettings(max_running=8)), WORKER_COMMAND) as gateway:
        for _ in tqdm(range(rounds), desc=f"recovery, spare worker: {spare_worker}", unit="kill", leave=False):
            while spare_worker and gateway.gateway.supervisor.spare_pid is None:
                time.sleep(_POLL_S)
            pauses.append(_pause(gateway))
    return {
        "experiment": "recovery with a spare worker" if spare_worker else "recovery",
        "value": round(statistics.median(pauses), 2),
        "unit": "s without a token",
        "pauses_s": [round(pause, 2) for pause in pauses],
    }


def _pause(gateway: GatewayThread) -> float:
    """From the last id that came before the worker was killed to the first one after, in seconds."""
    stream = gateway.stub.GenerateStream(ask("Tell me a long story.", max_new_tokens=2000, ignore_eos=True))
    for _ in range(10):
        next(stream)
    pid = gateway.gateway.supervisor.worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    pause, last = 0.0, time.monotonic()
    while gateway.gateway.supervisor.worker_pid in (pid, None) or pause < 0.05:
        next(stream)  # what the dead worker had sent still comes
        pause, last = time.monotonic() - last, time.monotonic()
    stream.cancel()
    gateway.wait_idle()
    return pause


def _cpu_s(server: Server) -> float:
    times = psutil.Process(server.pid).cpu_times()
    return float(times.user + times.system)


def _ms(values: Sequence[float], percent: float) -> float | None:
    return round(1000 * percentile(values, percent), 2) if values else None


def _percent_within(values: Sequence[float], limit_s: float) -> float | None:
    return round(100 * sum(value <= limit_s for value in values) / len(values), 2) if values else None


def _errors(*runs: Run) -> Row:
    errors = [error for run in runs for error in run.errors]
    return {"num_errors": len(errors), "first_error": errors[0]} if errors else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", action="append", default=[], choices=[*STEPS], help="only this step; may be given again")
    add("--seconds", type=float, default=60.0, help="how long requests arrive at each rate (default: 60)")
    add("--streams", type=int, default=2000, help="streams that are open at the same time (default: %(default)s)")
    add("--rounds", type=int, default=5, help="rounds of the other steps (default: %(default)s)")
    add("--real", action="store_true", help="the embedded model where a scripted worker would do")
    add("--json", type=Path, default=RESULTS / "overload.json", help="result file (default: benchmarks/results/)")
    arguments = parser.parse_args()
    end_with_servers()
    rows = []
    for name, step in STEPS.items():
        if not arguments.only or name in arguments.only:
            for row in step(arguments):
                rows.append(row)
                print(json.dumps(row), flush=True)
    write_result(arguments.json, rows)
    return 1 if any(row.get("num_errors") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
