"""`make bench`: every figure that has a target, measured in one run, and the table that holds them against it.

A peer that is not installed or fails is reported as such; a step that no time is left for is "not measured". Results
are written after each step: benchmarks/results/NAME.json, and NAME.md with plots once all are there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from benchmarks import experiments, report
from benchmarks.command import RESULTS, add_peers_folder
from benchmarks.environment import bandwidth_gb_per_s, describe
from benchmarks.online import compare
from benchmarks.peers.installed import PEERS
from benchmarks.server import Server, end_with_servers, serving, serving_peer
from benchmarks.summary import Row

# Ours: as shipped, and on the same bfloat16 weights as the peers.
SERVERS = {"parley": "", "parley-bf16": "--no-four-bit-linear"}


@dataclass(frozen=True)
class Size:
    """How much is measured. `limits_s`: seconds after which a run at so many streams is cut off; `scale`: how long all
    of it takes, measured by the short run."""

    peers: tuple[str, ...]
    limits_s: dict[int, float]
    rounds: int
    num_queued: int
    time_limit_s: float
    scale: float
    new_tokens: int = 128
    mixed: bool = False


SIZES = {
    "smoke": Size(("llama-cpp",), {1: 3.0, 4: 3.0}, 1, 200, 300.0, 0.3, new_tokens=16),
    "short": Size(("vllm", "llama-cpp"), {1: 6.0, 4: 6.0, 16: 8.0, 64: 14.0}, 2, 10_000, 600.0, 1.0),
    "full": Size(tuple(PEERS), {1: 20.0, 4: 20.0, 16: 40.0, 64: 60.0}, 2, 10_000, 6_000.0, 10.0, mixed=True),
}


class Suite:
    """One run. Each step adds rows; what fails adds a row that says so."""

    def __init__(self, size: Size, peers: Path, result: Path, started: float) -> None:
        self._size = size
        self._peers = peers
        self._result = result
        self._started = started
        self.rows: list[Row] = []
        # (name, about how long it takes in the short run, what to do), the most telling first.
        self.steps: list[tuple[str, float, Callable[[], list[Row]]]] = [
            ("start", 25, lambda: experiments.start()),
            ("throughput", 330, self._throughput),
            ("prompts-arriving", 30, self._alone(lambda server: experiments.interference(server))),
            ("shared-prefix", 25, self._alone(lambda server: experiments.prefix(server))),
            ("served-to-engine", 60, self._alone(self._served_to_engine)),
            ("queue", 75, lambda: experiments.queue_cost(num_queued=size.num_queued)),
            ("memory-growth", 45, lambda: experiments.memory_growth()),
        ]

    def run(self, only: list[str]) -> None:
        """Runs the steps, those named or all."""
        for name, estimate_s, step in self.steps:
            if only and name not in only:
                continue
            left_s = self._left_s()
            print(f"## {name}: about {estimate_s * self._size.scale:.0f} s; {left_s:.0f} s left", flush=True)
            started = time.monotonic()
            if left_s < estimate_s * self._size.scale and not only:
                self.rows.append({"step": name, "failed": "no time was left"})
            else:
                self._attempt(name, step)
            self.rows.append({"step": name, "took_s": round(time.monotonic() - started, 1)})
            self._write()

    def _left_s(self) -> float:
        return self._size.time_limit_s - (time.monotonic() - self._started)

    def _attempt(self, name: str, step: Callable[[], list[Row]]) -> None:
        try:
            rows = step()
        except Exception as error:  # one broken figure must not cost the others
            rows = [{"step": name, "failed": f"{type(error).__name__}: {error}"[:300]}]
        for row in rows:
            if "failed" in row or "experiment" in row:
                tqdm.write(json.dumps(row))
        self.rows += rows

    def _throughput(self) -> list[Row]:
        with ExitStack() as stack:
            servers = [stack.enter_context(serving(_quiet(serve), name)) for name, serve in SERVERS.items()]
            for name in self._size.peers:
                try:
                    servers.append(stack.enter_context(serving_peer(name, self._peers)))
                except Exception as error:
                    self.rows.append({"server": name, "failed": str(error)})
            for server in servers:
                mib = round(server.memory_bytes() / 2**20)
                self.rows.append({"server": server.name, "start_s": round(server.start_s, 1), "idle_mib": mib})
            for concurrency, limit_s in self._size.limits_s.items():
                self._compare(servers, "fixed", concurrency, limit_s)
            if self._size.mixed:
                self._compare(servers, "mixed", 16, 60.0)
                self._compare(servers, "mixed", 64, 60.0, arrivals_per_s=2.0)
        return []

    def _compare(
        self,
        servers: list[Server],
        workload: str,
        concurrency: int,
        limit_s: float,
        arrivals_per_s: float | None = None,
    ) -> None:
        if self._left_s() < limit_s * len(servers) * self._size.rounds:
            self.rows.append({"step": f"{workload}, {concurrency} streams", "failed": "no time was left"})
            return
        before = {server.name: server.process_ids() for server in servers}
        self.rows += compare(
            servers,
            workload,
            concurrency,
            number=max(4, 2 * concurrency),
            new_tokens=self._size.new_tokens,
            rounds=self._size.rounds,
            limit_s=limit_s,
            arrivals_per_s=arrivals_per_s,
        )
        for server in servers:
            if before[server.name] - server.process_ids():
                failed = f"one of its processes ended within {workload}, {concurrency} streams: is there enough memory?"
                self.rows.append({"server": server.name, "failed": failed})

    def _alone(self, experiment: Callable[[Server], list[Row]]) -> Callable[[], list[Row]]:
        def step() -> list[Row]:
            with serving(_quiet(SERVERS["parley"])) as server:
                return experiment(server)

        return step

    def _served_to_engine(self, server: Server) -> list[Row]:
        concurrency = max(self._size.limits_s)
        rounds = max(1, self._size.rounds - 1)
        return experiments.served_to_engine(server, SERVERS["parley"], rounds, concurrency, self._size.new_tokens)

    def _write(self) -> None:
        self._result.parent.mkdir(parents=True, exist_ok=True)
        environment = {**describe(), "memory_gb_per_s": f"{bandwidth_gb_per_s():.1f}"}
        content = {"environment": environment, "arguments": " ".join(sys.argv[1:]), "rows": self.rows}
        self._result.write_text(json.dumps(content) + "\n")


def _quiet(serve: str) -> list[str]:
    return ["--log-level", "warning", *shlex.split(serve)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=[*SIZES], default="short", help="how much to measure (default: %(default)s)")
    add("--only", action="append", default=[], metavar="STEP", help="only this step; may be given again")
    add("--minutes", type=float, help="the most that it may take; steps beyond are not measured")
    add_peers_folder(parser)
    add("--json", type=Path, help="result file (default: benchmarks/results/SIZE.json)")
    arguments = parser.parse_args()
    end_with_servers()
    size = SIZES[arguments.size]
    if arguments.minutes is not None:
        size = replace(size, time_limit_s=60 * arguments.minutes)
    suite = Suite(size, arguments.peers, arguments.json or RESULTS / f"{arguments.size}.json", time.monotonic())
    if unknown := set(arguments.only) - {name for name, _, _ in suite.steps}:
        parser.error(f"no such step: {', '.join(sorted(unknown))}")
    suite.run(arguments.only)
    print(report.write(arguments.json or RESULTS / f"{arguments.size}.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
