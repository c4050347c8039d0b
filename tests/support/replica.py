"""A replica as a process that can be killed, and started again at its old address."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_START_TIMEOUT_S = 60.0


class Replica:
    """Keeps its port over restarts."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._command = [sys.executable, "-m", "tests.support.scripted_server", "--folder", str(folder), *arguments]
        self.port = 0
        self.process: subprocess.Popen[str]
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it, and waits until it serves."""
        self.process = subprocess.Popen(
            [*self._command, "--port", str(self.port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().rpartition(":")[2])
        with grpc.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(), timeout=_START_TIMEOUT_S, wait_for_ready=True
            )
            for response in watch:
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return
        raise AssertionError("it never served")

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self._wait()

    def terminate(self) -> None:
        """SIGTERM; it must exit with 0."""
        self.process.send_signal(signal.SIGTERM)
        assert self._wait() == 0

    def stop(self) -> None:
        """Ends it, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self._wait()

    def _wait(self) -> int:
        code = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        time.sleep(0.05)
        return code


def start_replicas(number: int, folder: Path, *arguments: str) -> list[Replica]:
    """Several, all at once."""
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(lambda _: Replica(folder, *arguments), range(number)))
