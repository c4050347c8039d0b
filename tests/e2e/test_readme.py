"""The README's commands for stubs of other languages do what it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def command_with(text: str) -> str:
    (command,) = (command for command in COMMANDS if text in command)
    return str(command)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the protos, and `protoc` and `buf` on the path of `run`."""
    shutil.copytree(ROOT / "protos", tmp_path / "protos", ignore=shutil.ignore_patterns("gen"))
    protoc = tmp_path / "bin" / "protoc"
    protoc.parent.mkdir()
    # The compiler itself, out of grpcio-tools, which lives in an environment of its own (see CONTRIBUTING.md).
    protoc.write_text(f'#!/bin/sh\nexec "{ROOT}/.venv/protoc/bin/python" -m grpc_tools.protoc "$@"\n')
    protoc.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("tool", ["protoc", "buf"])
def test_the_command_for_stubs_makes_them(checkout: Path, tool: str) -> None:
    command = command_with({"protoc": "--java_out", "buf": "buf generate"}[tool])
    path = os.pathsep.join([str(checkout / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["sh", "-ec", command], cwd=checkout, env={**os.environ, "PATH": path}, check=True, timeout=60)
    made = {path.name for path in (checkout / "gen" / tool).rglob("*.java")}
    assert {"GenerateRequest.java", "GenerateStreamResponse.java", "ErrorReason.java"} <= made
