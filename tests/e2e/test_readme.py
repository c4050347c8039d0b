"""The commands for stubs of other languages, in the README and docs/clients.md, do what it says there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def command_with(text: str, page: str = "README.md") -> str:
    commands = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (command,) = (command for command in commands if text in command)
    return str(command)


def run(command: str, folder: Path) -> None:
    # protoc and buf are dev dependencies
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["sh", "-ec", command], cwd=folder, env={**os.environ, "PATH": path}, check=True, timeout=60)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the protos and nothing else."""
    shutil.copytree(ROOT / "protos", tmp_path / "protos", ignore=shutil.ignore_patterns("gen"))
    return tmp_path


@pytest.mark.parametrize("tool", ["protoc", "buf"])
def test_the_command_for_stubs_makes_them(checkout: Path, tool: str) -> None:
    run(command_with({"protoc": "--java_out", "buf": "buf generate"}[tool]), checkout)
    made = {path.name for path in (checkout / "gen" / tool).rglob("*.java")}
    assert {"GenerateRequest.java", "GenerateStreamResponse.java", "ErrorReason.java"} <= made


def test_protoc_alone_makes_the_messages_of_seven_languages(checkout: Path) -> None:
    run(command_with("for language in", "docs/clients.md"), checkout)
    made = {str(path.relative_to(checkout / "gen")) for path in (checkout / "gen").rglob("*") if path.is_file()}
    assert {
        "cpp/parley/v1/chat.pb.h",
        "csharp/Chat.cs",
        "java/parley/v1/GenerateRequest.java",
        "kotlin/parley/v1/GenerateRequestKt.kt",
        "objc/parley/v1/Chat.pbobjc.h",
        "php/Parley/V1/GenerateRequest.php",
        "ruby/parley/v1/chat_pb.rb",
    } <= made
