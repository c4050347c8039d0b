"""CPU time that a request costs the gateway process before its first token.

Serves the model, sends requests of one token (so that all of a request's work in the gateway is work before the first
token, and sending it), one after the other, and divides the gateway's CPU time by their number. The worker's own time
does not count: it is another process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import psutil
from tqdm import tqdm

from benchmarks.environment import describe
from benchmarks.server import serving
from parley_client import Client, user

_LIMIT_MS = 5.0
# With the embedded model's chat template and default system prompt: 60 to 70 tokens.
_PROMPT = (
    "Explain in a few sentences how a bicycle stays upright while it is moving, what the rider does to help, "
    "and why it falls over when it stops."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds, of which the median counts (default: %(default)s)"
    )
    parser.add_argument("--requests", type=int, default=100, help="requests a round (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the result as JSON")
    parser.add_argument("serve", nargs="*", help="arguments of parleyd serve, after --")
    arguments = parser.parse_args()

    with serving(arguments.serve) as server, Client(server.target) as client:
        prompt_tokens = client.count_tokens([user(_PROMPT)])
        gateway = psutil.Process(server.pid)
        measure(client, gateway, arguments.requests)  # warm-up
        rounds = [measure(client, gateway, arguments.requests) for _ in tqdm(range(arguments.rounds), unit="round")]
    cpu_ms = statistics.median(cpu for cpu, _ in rounds)
    result = {
        "gateway_cpu_ms_per_request": round(cpu_ms, 3),
        "spread_ms": [round(min(cpu for cpu, _ in rounds), 3), round(max(cpu for cpu, _ in rounds), 3)],
        "wall_ms_per_request": round(statistics.median(wall for _, wall in rounds), 3),
        "prompt_tokens": prompt_tokens,
        "requests": arguments.rounds * arguments.requests,
        "limit_ms": _LIMIT_MS,
        **describe(),
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def measure(client: Client, gateway: psutil.Process, num_requests: int) -> tuple[float, float]:
    """Milliseconds a request: the gateway's CPU time, and the wall time seen by the client."""
    before, started = gateway.cpu_times(), time.monotonic()
    for i in range(num_requests):
        client.chat([user(f"{_PROMPT} {i}")], max_new_tokens=1)
    after, ended = gateway.cpu_times(), time.monotonic()
    cpu_s = (after.user - before.user) + (after.system - before.system)
    return 1000 * cpu_s / num_requests, 1000 * (ended - started) / num_requests


if __name__ == "__main__":
    sys.exit(main())
