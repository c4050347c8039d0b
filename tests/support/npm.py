"""npm packages of the repository: installed as their lock files say, built, and run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CLIENTS = Path(__file__).resolve().parents[2] / "clients"
PROGRAMS = Path(sys.executable).parent  # node and npm are dev dependencies


def npm(package: Path, *arguments: str, **environ: str) -> None:
    """Runs npm in a package's folder; it must succeed."""
    path = os.pathsep.join([str(PROGRAMS), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, **environ}
    command = [str(PROGRAMS / "npm"), *arguments]
    result = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


def build(package: Path) -> None:
    """`npm ci`, unless what is installed is what the lock file names; then the build."""
    lock = package / "package-lock.json"
    stamp = package / "node_modules" / ".installed"
    if not stamp.exists() or stamp.read_text() != lock.read_text():
        npm(package, "ci", "--ignore-scripts", "--no-audit", "--no-fund")
        stamp.write_text(lock.read_text())
    npm(package, "run", "build")
