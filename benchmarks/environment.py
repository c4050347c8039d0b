"""Where a figure was measured: hardware, versions, commit. Every benchmark prints it beside its results."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

_PACKAGES = ("parley", "torch", "transformers", "grpcio", "protobuf")
# Best of ten sums over 512 MiB, far more than any cache holds; with torch, in a process of its own.
_BANDWIDTH = """
import time, torch
values = torch.ones(2**27)
times = []
for _ in range(10):
    started = time.perf_counter()
    values.sum()
    times.append(time.perf_counter() - started)
print(values.nbytes / min(times) / 1e9)
"""


def describe() -> dict[str, str]:
    """One line each."""
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return {
        "cpu": f"{_cpu_model()} x {os.cpu_count()}",
        "load_average": load,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


@functools.cache
def bandwidth_gb_per_s() -> float:
    """What this machine's main memory gives when read from end to end by all cores, measured now."""
    command = [sys.executable, "-c", _BANDWIDTH]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or no checkout
        return "unknown"
