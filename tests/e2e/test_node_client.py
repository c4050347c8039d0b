"""clients/node: it builds, its own tests pass, and so do those against a real service."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.served import ServedProcess

NODE_CLIENT = Path(__file__).resolve().parents[2] / "clients" / "node"
PROGRAMS = Path(sys.executable).parent  # node and npm are dev dependencies

pytestmark = pytest.mark.timeout(400)


def npm(*arguments: str, **environ: str) -> None:
    path = os.pathsep.join([str(PROGRAMS), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, **environ}
    command = [str(PROGRAMS / "npm"), *arguments]
    result = subprocess.run(command, cwd=NODE_CLIENT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def built() -> None:
    """`npm ci`, unless what is installed is what the lock file names; then the build."""
    lock = NODE_CLIENT / "package-lock.json"
    stamp = NODE_CLIENT / "node_modules" / ".installed"
    if not stamp.exists() or stamp.read_text() != lock.read_text():
        npm("ci", "--ignore-scripts", "--no-audit", "--no-fund")
        stamp.write_text(lock.read_text())
    npm("run", "build")


@pytest.mark.usefixtures("built")
def test_the_client_alone() -> None:
    npm("test")


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("served", ["batching"], indirect=True)
@pytest.mark.parametrize("script", ["test:live", "example"])
def test_the_client_and_a_real_service(served: ServedProcess, script: str) -> None:
    npm("run", script, PARLEY_TARGET=served.target)
