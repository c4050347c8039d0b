"""Throughput and latency as served: a closed loop of streams over gRPC, from this process to a server process.

Each of `concurrency` clients sends its next request as soon as its last one is answered: prompts of about 64 tokens, no
two alike, exactly `--new-tokens` greedy tokens back. With `--against` a second server with other arguments is measured
in turns with the first (A B A B), and the ratio of the medians is told: on a noisy machine only that counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from benchmarks.environment import describe
from benchmarks.server import serving
from parley_client import AsyncClient, user

_WORDS = ["river", "stone", "cloud", "engine", "garden", "winter", "letter", "signal", "copper", "island", "mirror"]
_PROMPT_WORDS = 24


@dataclass
class Run:
    """What one closed loop saw. Times in seconds."""

    wall_s: float = 0.0
    num_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    between_tokens_s: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.wall_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, help="requests a round (default: twice the concurrency, at least 4)")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of each answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which medians count (default: %(default)s)")
    parser.add_argument("--serve", default="", help="arguments of parleyd serve, such as '--engine batching'")
    parser.add_argument("--against", help="arguments of a second server to compare with")
    parser.add_argument("--json", type=Path, help="file for the results as JSON")
    arguments = parser.parse_args()

    labels = [arguments.serve or "(defaults)"] + ([arguments.against] if arguments.against is not None else [])
    results: list[dict[str, object]] = []
    with ExitStack() as stack:
        quiet = ["--log-level", "warning"]
        commands = [arguments.serve] + ([arguments.against] if arguments.against is not None else [])
        targets = [stack.enter_context(serving([*quiet, *shlex.split(command)])).target for command in commands]
        for concurrency in arguments.concurrency:
            num_requests = arguments.requests or max(4, 2 * concurrency)
            runs: list[list[Run]] = [[] for _ in targets]
            for _ in tqdm(range(arguments.rounds + 1), desc=f"c={concurrency}", unit="round"):
                for index, target in enumerate(targets):
                    loop = closed_loop(target, concurrency, num_requests, arguments.new_tokens)
                    runs[index].append(asyncio.run(loop))
            results += [summarise(label, concurrency, one[1:]) for label, one in zip(labels, runs, strict=True)]
            print_rows(results[-len(targets) :])
    report = {"new_tokens": arguments.new_tokens, "rounds": arguments.rounds, "results": results, **describe()}
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(describe()))
    return 0


async def closed_loop(target: str, concurrency: int, num_requests: int, new_tokens: int) -> Run:
    """Sends the requests, at most `concurrency` at a time."""
    run, remaining = Run(), iter(range(num_requests))
    chance = random.Random(time.time_ns())

    async with AsyncClient(target) as client:

        async def one_client() -> None:
            for _ in remaining:
                await one_request(client, run, chance, new_tokens)

        started = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(concurrency)))
        run.wall_s = time.perf_counter() - started
    return run


async def one_request(client: AsyncClient, run: Run, chance: random.Random, new_tokens: int) -> None:
    """Streams one answer and notes when its tokens came."""
    prompt = " ".join(chance.choices(_WORDS, k=_PROMPT_WORDS))
    last = time.perf_counter()
    is_first = True
    options = {"max_new_tokens": new_tokens, "ignore_eos": True, "do_sample": False}
    async for piece in client.stream([user(f"Write a long story about: {prompt}")], **options):
        now = time.perf_counter()
        if count := len(piece.token_ids):
            (run.first_token_s if is_first else run.between_tokens_s).extend([(now - last) / count] * count)
            run.num_tokens += count
            is_first, last = False, now


def summarise(label: str, concurrency: int, runs: list[Run]) -> dict[str, object]:
    """Medians over the rounds; percentiles over all their tokens."""
    first = sorted(value for run in runs for value in run.first_token_s)
    between = sorted(value for run in runs for value in run.between_tokens_s)
    return {
        "server": label,
        "concurrency": concurrency,
        "tokens_per_s": round(statistics.median(run.tokens_per_s for run in runs), 1),
        "ttft_p50_ms": round(1000 * percentile(first, 0.5), 1),
        "ttft_p95_ms": round(1000 * percentile(first, 0.95), 1),
        "itl_p50_ms": round(1000 * percentile(between, 0.5), 2),
        "itl_p95_ms": round(1000 * percentile(between, 0.95), 2),
    }


def percentile(ordered: list[float], share: float) -> float:
    """The value below which `share` of the ordered values lie."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def print_rows(rows: list[dict[str, object]]) -> None:
    """One line each, and the ratio of the first to the second."""
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if len(rows) == 2:
        print(f"ratio of tokens_per_s: {float(str(rows[0]['tokens_per_s'])) / float(str(rows[1]['tokens_per_s'])):.2f}")


if __name__ == "__main__":
    sys.exit(main())
