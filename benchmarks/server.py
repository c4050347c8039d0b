"""Server processes for benchmarks: `parleyd serve` and its peers, each started on a free port, paused, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.clients import GrpcClient, HttpClient
from benchmarks.load import Client
from benchmarks.peers.installed import PEERS, Peer, weights_folder
from parley_client import Client as ParleyClient
from parleyd.model.embedded import find_embedded_model

_READY_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.1
_NO_FOUR_BIT = "--no-four-bit-linear"
_PARLEYD = ("parleyd", "serve", "--port", "0", "--drain-delay", "0")
_ROOT = Path(__file__).parents[1]


@dataclass
class Server:
    """A ready server. `pid` is its first process's, `start_s` how long it took to serve."""

    name: str
    target: str
    process: subprocess.Popen[Any]
    start_s: float
    weight_bytes: int
    peer: Peer | None = None
    model: str = ""
    body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        return self.process.pid

    def client(self) -> Client:
        """A new connection; to be made inside an event loop."""
        return HttpClient(self.target, self.model, self.body) if self.peer else GrpcClient(self.target)

    def memory_bytes(self) -> int:
        """Of all its processes; what they share counts once."""
        return sum(process.memory_full_info().pss for process in self._processes())

    def process_ids(self) -> set[int]:
        """Of all its processes that are there."""
        try:
            return {process.pid for process in self._processes()}
        except psutil.NoSuchProcess:
            return set()

    def _processes(self) -> list[psutil.Process]:
        first = psutil.Process(self.pid)
        return [first, *first.children(recursive=True)]

    def pause(self) -> None:
        """Takes its processes off the cores, whatever they do while idle, until `resume`."""
        _signal(self.process, signal.SIGSTOP)

    def resume(self) -> None:
        _signal(self.process, signal.SIGCONT)


def end_with_servers() -> None:
    """Has SIGTERM end this process as Ctrl-C does, so that the servers it started end too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextmanager
def alone(server: Server, servers: Sequence[Server]) -> Iterator[None]:
    """All others are paused for the body of the `with`."""
    others = [other for other in servers if other is not server]
    for other in others:
        other.pause()
    try:
        yield
    finally:
        for other in others:
            other.resume()


@contextmanager
def serving(arguments: Sequence[str] = (), name: str = "parley", program: Sequence[str] = _PARLEYD) -> Iterator[Server]:
    """Our own server; `arguments` are those of `parleyd serve`, or of another `program` of ours."""
    command = [sys.executable, "-m", *program, *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with _ended(process):
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            raise RuntimeError("parleyd did not start; its log tells why")
        target = line.removeprefix("listening on ").strip()
        with ParleyClient(target) as client:
            client.wait_until_ready(timeout=_READY_TIMEOUT_S)
        yield Server(name, target, process, time.perf_counter() - started, our_weight_bytes(arguments))


@contextmanager
def serving_peer(name: str, peers: Path) -> Iterator[Server]:
    """A peer of peers/installed.py, its log beside its environment. Raises RuntimeError where it does not start."""
    peer = PEERS[name]
    if not (peers / peer.environment / "bin" / "python").exists():
        raise RuntimeError(f"{name} is not installed: make bench-peers")
    port = _free_port()
    model = peer.model(peers)
    log = peers / f"{name}.log"
    started = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            peer.command(peers / peer.environment / "bin", model, port),
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=_ROOT,
            env={**os.environ, **peer.environ},
            start_new_session=True,
        )
    with _ended(process):
        target = f"127.0.0.1:{port}"
        _wait_http(process, f"http://{target}/health", log)
        start_s = time.perf_counter() - started
        yield Server(name, target, process, start_s, weight_bytes(Path(model)), peer, model, peer.body)


def our_weight_bytes(arguments: Sequence[str]) -> int:
    """As `weight_bytes`, for our own server or engine with these arguments, where few streams run."""
    return weight_bytes(find_embedded_model() if _NO_FOUR_BIT not in arguments else weights_folder())


def weight_bytes(model: Path) -> int:
    """What a decode step reads at least: all weights once. `model`: a .gguf file, or a folder of transformers."""
    return (model if model.is_file() else model / "model.safetensors").stat().st_size


@contextmanager
def _ended(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Ends the whole process group, kindly at first."""
    try:
        yield
    finally:
        _signal(process, signal.SIGCONT)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT_S)
        _signal(process, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _signal(process: subprocess.Popen[Any], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _wait_http(process: subprocess.Popen[Any], url: str, log: Path) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"exit code {process.returncode}: {' '.join(last)[:200]} (see {log.name})")
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(_POLL_S)
    raise RuntimeError(f"not ready after {_READY_TIMEOUT_S:.0f} s (see {log.name})")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
