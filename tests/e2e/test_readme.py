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
    """A folder with the protos and nothing else."""
    shutil.copytree(ROOT / "protos", tmp_path / "protos", ignore=shutil.ignore_patterns("gen"))
    return tmp_path


@pytest.mark.parametrize("tool", ["protoc", "buf"])
def test_the_command_for_stubs_makes_them(checkout: Path, tool: str) -> None:
    command = command_with({"protoc": "--java_out", "buf": "buf generate"}[tool])
    path = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ["PATH"]]
    )  # protoc and buf are dev dependencies
    subprocess.run(["sh", "-ec", command], cwd=checkout, env={**os.environ, "PATH": path}, check=True, timeout=60)
    made = {path.name for path in (checkout / "gen" / tool).rglob("*.java")}
    assert {"GenerateRequest.java", "GenerateStreamResponse.java", "ErrorReason.java"} <= made
