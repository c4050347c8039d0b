"""`parleyd serve` as a process, as a user starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from parley.v1 import chat_pb2_grpc

_START_TIMEOUT_S = 180.0


class ServedProcess:
    """Starts on a free port; `target` is its HOST:PORT, `log` what it wrote so far on a stderr of ours."""

    def __init__(self, *arguments: str, environ: dict[str, str] | None = None, stderr: int | None = None) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self.process = subprocess.Popen(
            [sys.executable, "-m", "parleyd", "serve", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=self._log if stderr is None else stderr,
            text=True,
            env={**_environ(), **(environ or {})},
        )
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline()
        self.target = self.first_line.removeprefix("listening on ").strip()

    def __enter__(self) -> ServedProcess:
        self.channel = grpc.insecure_channel(self.target)
        self.stub = chat_pb2_grpc.ChatServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        return self

    def __exit__(self, *exc: object) -> None:
        self.channel.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()

    @property
    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode()

    def wait_health(self, status: int = health_pb2.HealthCheckResponse.SERVING) -> None:
        """Watches the health service until it says so."""
        request = health_pb2.HealthCheckRequest()
        for response in self.health.Watch(request, timeout=_START_TIMEOUT_S, wait_for_ready=True):
            if response.status == status:
                return
        raise AssertionError("the watch ended")

    def terminate(self, timeout_s: float = 60.0) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def worker_pids(self) -> list[int]:
        """The live workers, without the processes that check grammars."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if "parleyd.grammar" not in Path(f"/proc/{pid}/cmdline").read_text()]


def _environ() -> dict[str, str]:
    """All cores for it, as a user's has, also where tests run side by side (tests/conftest.py)."""
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


def serve_until_exit(
    arguments: Sequence[str], timeout_s: float = 120.0, prefix: Sequence[str] = (), **options: Any
) -> subprocess.CompletedProcess[str]:
    """`parleyd` with these arguments, behind the command `prefix`, run to its end."""
    command = [*prefix, sys.executable, "-m", "parleyd", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, **options)
