"""Throughput and latency as served: from this process to server processes, ours over gRPC, peers over HTTP.

All servers are measured in turns (A B A B) on the same seeded requests, and the ratio of the first to each other is
the median over the turns: on a noisy machine only that counts. While one is measured the others are paused.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack

from tqdm import tqdm

from benchmarks import workload
from benchmarks.command import build_parser, num_requests, write_result
from benchmarks.environment import bandwidth_gb_per_s
from benchmarks.measure import in_turns
from benchmarks.peers.installed import PEERS
from benchmarks.server import Server, end_with_servers, serving, serving_peer
from benchmarks.summary import Row, line, ratio, summarise
from benchmarks.workload import Request

WORKLOADS = ("fixed", "mixed", "cold-prefix", "shared-prefix")


def main() -> int:
    arguments = _parser().parse_args()
    end_with_servers()
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(["--log-level", "warning", *shlex.split(arguments.serve)]))]
        if arguments.against is not None:
            command = ["--log-level", "warning", *shlex.split(arguments.against)]
            servers.append(stack.enter_context(serving(command, name=arguments.against or "(defaults)")))
        servers += [stack.enter_context(serving_peer(name, arguments.peers)) for name in arguments.peer]
        rows = []
        for concurrency in arguments.concurrency:
            rows += compare(
                servers,
                arguments.workload,
                concurrency,
                number=num_requests(arguments, concurrency),
                new_tokens=arguments.new_tokens,
                rounds=arguments.rounds,
                limit_s=arguments.limit,
                arrivals_per_s=arguments.arrivals_per_s,
                seed=arguments.seed,
            )
    write_result(arguments.json, rows)
    return 1 if any(row.get("num_errors") or row.get("num_refused") for row in rows) else 0


def compare(
    servers: list[Server],
    name: str,
    concurrency: int,
    *,
    number: int,
    new_tokens: int,
    rounds: int,
    limit_s: float | None = None,
    arrivals_per_s: float | None = None,
    seed: int = 0,
) -> list[Row]:
    """One row a server, printed as soon as it is there; those after the first with the first's ratio to them."""
    make = maker(name, concurrency, number, new_tokens, arrivals_per_s, seed)
    is_open = arrivals_per_s is not None
    label = f"{name} c={concurrency}"
    measured = in_turns(servers, make, concurrency, rounds=rounds, limit_s=limit_s, is_open=is_open, label=label)
    rows = []
    for server, runs in zip(servers, measured, strict=True):
        labels = {
            "server": server.name,
            "workload": name,
            "loop": f"open, {arrivals_per_s} a second" if is_open else "closed",
            "concurrency": concurrency,
        }
        row = summarise(labels, runs, server.weight_bytes, bandwidth_gb_per_s() if name == "fixed" else 0)
        if rows and row["tokens_per_s"]:
            row["ratio_of_first"] = round(ratio(rows[0]["rounds"], row["rounds"]), 3)
        rows.append(row)
        tqdm.write(line(row), file=sys.stdout)
    return rows


def maker(
    name: str, concurrency: int, number: int, new_tokens: int, arrivals_per_s: float | None = None, seed: int = 0
) -> Callable[[int], list[Request]]:
    """The requests of a round. Each round of each concurrency has prompts of its own, since the servers stay up: a
    cache that remembers earlier ones is of no use."""
    first_seed = 100 * seed + concurrency

    def make(round_: int) -> list[Request]:
        round_seed = 1000 * first_seed + round_
        match name:
            case "mixed":
                requests = workload.mixed(round_seed, number)
            case "cold-prefix" | "shared-prefix":
                # A shared prompt is the same in all rounds, and the warm-up of the first round's first user.
                is_shared = name == "shared-prefix"
                requests = workload.shared_prefix(
                    first_seed if is_shared else round_seed, number, new_tokens, is_shared=is_shared
                )
            case _:
                requests = workload.fixed(round_seed, number, new_tokens)
        return workload.poisson(round_seed, requests, arrivals_per_s) if arrivals_per_s is not None else requests

    return make


def _parser() -> argparse.ArgumentParser:
    parser = build_parser(__doc__, "online.json", PEERS)
    add = parser.add_argument
    add("--workload", choices=WORKLOADS, default="fixed", help="(default: %(default)s)")
    add("--arrivals-per-s", type=float, help="an open loop: requests arrive at random, so many a second on average")
    add("--limit", type=float, help="seconds after which a run is cut off (default: none)")
    add("--against", help="arguments of a second server of ours to compare with")
    return parser


if __name__ == "__main__":
    sys.exit(main())
