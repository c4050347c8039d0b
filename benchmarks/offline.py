"""The engine alone, in this process: no gateway, no text, no gRPC. A closed loop on the same requests as online.py's.

Prints tokens/s, the memory bandwidth that reading the weights takes, its share of what this machine gives, and
latencies; `--peer llama-cpp` and `--peer vllm` measure their engines in turns with ours, without their servers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from parleyd.worker.openmp import openmp_variables

# As the worker process does, and before torch is imported.
os.environ.update(openmp_variables(os.environ, "--no-bind-threads" not in " ".join(sys.argv)))

import transformers
from tqdm import tqdm

from benchmarks import workload
from benchmarks.command import build_parser, num_requests, write_result
from benchmarks.environment import bandwidth_gb_per_s
from benchmarks.load import Run, drive
from benchmarks.peers.installed import PEERS
from benchmarks.server import our_weight_bytes, weight_bytes
from benchmarks.summary import Row, line, ratio, summarise
from parleyd import cli
from parleyd.config import ModelSettings
from parleyd.engine.engine import Engine
from parleyd.generation import EngineRequest, ModelInfo, SamplingParams
from parleyd.worker.load import load

_WARM_UP_SEED = 2**32


class OfflineEngine:
    """Our engine with prompts made as the gateway makes them."""

    def __init__(self, settings: ModelSettings) -> None:
        engine: Engine
        info: ModelInfo
        engine, info = load(settings)
        self.info = info
        self._engine = engine
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(info.tokenizer_dir)
        self._keys = itertools.count()

    def run(self, seed: int, concurrency: int, number: int, new_tokens: int) -> Run:
        """One closed loop."""
        asked = [self._request(request) for request in workload.fixed(seed, number, new_tokens)]
        return drive(self._engine, asked, new_tokens, concurrency)

    def _request(self, request: workload.Request) -> EngineRequest:
        messages = [{"role": role, "content": content} for role, content in request.messages]
        encoded = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        params = SamplingParams(max_new_tokens=request.new_tokens, ignore_eos=True)
        return EngineRequest(key=next(self._keys), prompt_ids=tuple(encoded["input_ids"]), params=params)


def run_peer(name: str, peers: Path, concurrency: int, number: int, new_tokens: int) -> Run:
    """The same closed loop in a peer's own process."""
    peer = PEERS[name]
    program = [str(peers / peer.environment / "bin" / "python"), "-m", f"benchmarks.peers.{peer.engine}"]
    command = [*program, "--model", peer.model(peers), "--offline"]
    command += map(str, (concurrency, number, new_tokens))
    ours = ("GOMP_SPINCOUNT", "OMP_PROC_BIND")
    environ = {name: value for name, value in os.environ.items() if name not in ours} | dict(peer.environ)
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
        env=environ,
        preexec_fn=_use_all_processors,
    )
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def _use_all_processors() -> None:
    # The thread that peers are started from is bound to one of them.
    os.sched_setaffinity(0, range(os.cpu_count() or 1))


def main() -> int:
    peers = [name for name, peer in PEERS.items() if peer.engine]
    arguments = build_parser(__doc__, "offline.json", peers).parse_args()
    engine = OfflineEngine(_model_settings(arguments.serve))
    rows: list[Row] = []
    for concurrency in arguments.concurrency:
        rows += _measure(engine, arguments, concurrency)
    write_result(arguments.json, rows)
    return 0


def _measure(engine: OfflineEngine, arguments: argparse.Namespace, concurrency: int) -> list[Row]:
    number = num_requests(arguments, concurrency)
    engine.run(_WARM_UP_SEED, concurrency, concurrency, 8)
    runs: dict[str, list[Run]] = {name: [] for name in ("engine", *arguments.peer)}
    for round_ in tqdm(range(arguments.rounds), desc=f"c={concurrency}", unit="round", leave=False):
        seed = 1000 * (100 * arguments.seed + concurrency) + round_
        runs["engine"].append(engine.run(seed, concurrency, number, arguments.new_tokens))
        for name in arguments.peer:
            runs[name].append(run_peer(name, arguments.peers, concurrency, number, arguments.new_tokens))
    rows, serve = [], shlex.split(arguments.serve)
    for name, its_runs in runs.items():
        is_peer = name in PEERS
        read = weight_bytes(Path(PEERS[name].model(arguments.peers))) if is_peer else our_weight_bytes(serve)
        labels = {"server": name, "workload": "fixed", "concurrency": concurrency, "dtype": engine.info.dtype}
        if is_peer:
            del labels["dtype"]
        row = summarise(labels, its_runs, read, bandwidth_gb_per_s())
        if rows:
            row["ratio_of_first"] = round(ratio(rows[0]["rounds"], row["rounds"]), 3)
        rows.append(row)
        tqdm.write(line(row), file=sys.stdout)
    return rows


def _model_settings(serve: str) -> ModelSettings:
    parsed = vars(cli.build_parser(os.environ).parse_args(["serve", *shlex.split(serve)]))
    return ModelSettings(**{option.name: parsed[option.name] for option in fields(ModelSettings)})


if __name__ == "__main__":
    sys.exit(main())
