"""A long run of traffic under faults, and its figures: `make soak`, or `python -m tests.robustness.soak --help`."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from parleyd.config import ModelSettings, ServerSettings, Settings
from parleyd.gateway.worker_link import WORKER_COMMAND
from tests.robustness.failpoints import (
    FAULTS,
    KEEPALIVE_TIME_S,
    KEEPALIVE_TIMEOUT_S,
    SCRIPTED_FAULTS,
    WORKER_TIMEOUT_S,
    Failpoint,
    kill_worker,
)
from tests.robustness.known_answers import KnownAnswers
from tests.robustness.traffic import Traffic
from tests.robustness.validators import Belongings, assert_idle, tasks_at_rest
from tests.support.gateway import GatewayThread, scripted_command, scripted_settings
from tests.support.tiny_tokenizer import write_tiny_tokenizer

_NEVER = 10**9


def main() -> int:
    """Prints the figures as JSON; exit code 1 if an answer was wrong."""
    arguments = _parser().parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        settings, command = _replica(Path(folder), arguments)
        with GatewayThread(settings, command) as gateway:
            at_rest = tasks_at_rest(gateway)
            kind = KnownAnswers if arguments.real_model else Traffic
            traffic = kind(gateway.target, chance, arguments.clients)
            figures = asyncio.run(_soak(gateway, traffic, chance, arguments))
            assert_idle(gateway, at_rest)
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if figures["wrong_answers"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800.0, help="how long new requests are begun (1800)")
    parser.add_argument("--requests", type=int, default=_NEVER, help="at most so many requests")
    parser.add_argument("--every", type=float, nargs=2, default=(5.0, 20.0), help="seconds between faults (5 20)")
    parser.add_argument("--faults", type=int, default=_NEVER, help="at most so many faults")
    parser.add_argument("--kills-only", action="store_true", help="no fault but SIGKILL of the worker")
    parser.add_argument("--real-model", action="store_true", help="the embedded model instead of a scripted worker")
    parser.add_argument("--clients", type=int, default=24, help="requests that are open at the same time (24)")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--json", type=Path, help="where to write the figures too")
    return parser


def _replica(folder: Path, arguments: argparse.Namespace) -> tuple[Settings, Sequence[str]]:
    if arguments.real_model:
        server = ServerSettings(
            port=0,
            drain_delay=0.0,
            max_worker_restarts=20,
            worker_timeout=30.0,
            keepalive_time=KEEPALIVE_TIME_S,
            keepalive_timeout=KEEPALIVE_TIMEOUT_S,
        )
        return Settings(server=server, model=ModelSettings(dtype="float32", max_running=8)), WORKER_COMMAND
    settings = scripted_settings(
        max_running=16,
        max_queue=100,
        max_worker_restarts=20,
        worker_timeout=WORKER_TIMEOUT_S,
        keepalive_time=KEEPALIVE_TIME_S,
        keepalive_timeout=KEEPALIVE_TIMEOUT_S,
    )
    command = scripted_command(write_tiny_tokenizer(folder), "--step-delay", "0.01", "--max-running", "16")
    return settings, command


async def _soak(
    gateway: GatewayThread, traffic: Traffic | KnownAnswers, chance: random.Random, arguments: argparse.Namespace
) -> dict[str, Any]:
    started = time.monotonic()
    end = started + arguments.seconds
    failpoints: Sequence[Failpoint] = (kill_worker,) if arguments.kills_only else FAULTS
    if arguments.real_model:
        failpoints = [failpoint for failpoint in failpoints if failpoint not in SCRIPTED_FAULTS]
    dealt: Counter[str] = Counter()
    memory: list[int] = []

    async def deal() -> None:
        while dealt.total() < arguments.faults:
            await asyncio.sleep(chance.uniform(*arguments.every))
            failpoint = chance.choice(failpoints)
            await failpoint(gateway, chance)
            dealt[failpoint.__name__] += 1
            memory.append(Belongings().memory_bytes)

    with tqdm(
        total=arguments.requests if arguments.requests < _NEVER else None, unit=" requests", file=sys.stderr
    ) as bar:

        def is_over(num_begun: int) -> bool:
            bar.update(num_begun - bar.n)
            return num_begun >= arguments.requests or time.monotonic() > end

        dealing = asyncio.create_task(deal())
        await traffic.run(is_over)
        dealing.cancel()
    outcomes = traffic.outcomes
    return {
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - started),
        "model": "embedded" if arguments.real_model else "scripted",
        "requests": traffic.num_begun,
        "ended": outcomes.num_ended,
        "hung": traffic.num_begun - outcomes.num_ended,
        "wrong_answers": len(outcomes.faults),
        "what_was_wrong": outcomes.faults[:10],
        "by_kind": dict(outcomes.counts),
        "faults": dict(dealt),
        "workers_replaced": gateway.gateway.supervisor.num_restarts,
        "requests_handed_over": gateway.gateway.worker.num_handed_over,
        "memory_mb_first_to_last": [round(value / 1e6) for value in (memory[:1] + memory[-1:])],
    }


if __name__ == "__main__":
    sys.exit(main())
