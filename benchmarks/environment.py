"""Where a figure was measured: hardware, versions, commit. Every benchmark prints it beside its results."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path


def describe() -> dict[str, str]:
    """One line each."""
    return {
        "cpu": f"{_cpu_model()} x {os.cpu_count()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("parley", "torch", "transformers", "grpcio", "protobuf")},
        "commit": _commit(),
    }


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
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
