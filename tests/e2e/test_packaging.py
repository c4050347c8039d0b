"""What `pip install parley` gives: the client, small and alone."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from parley.v1 import chat_pb2_grpc

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.timeout(180)


def _run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=150)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("parley-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment's folder of programs, with the wheel's base installation."""
    folder = tmp_path_factory.mktemp("installed with a space in the name")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    _run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel, cwd=folder)
    return folder / "bin"


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names} == {
        "parley",
        "parley_client",
        "parley_command",
        "parleyd",
        f"{wheel.name.split('-py3')[0]}.dist-info",
    }
    for wanted in (
        "parley/py.typed",
        "parley/v1/chat_pb2.py",
        "parley/v1/chat_pb2.pyi",
        "parley/v1/chat_pb2_grpc.py",
        "parley/v1/chat_pb2_grpc.pyi",
        "parley_client/py.typed",
        "parley_client/cli.py",
        "parleyd/cli.py",
        "parleyd/gateway/server.py",
        "parleyd/worker/__main__.py",
    ):
        assert wanted in names
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_the_wheel_holds_every_module_of_the_tree(wheel: Path) -> None:
    shelves = [ROOT / shelf for shelf in ("protos/gen/python", "clients/python", "service")]
    modules = {str(path.relative_to(shelf)) for shelf in shelves for path in shelf.rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        assert modules <= set(archive.namelist())


def test_the_oldest_grpcio_that_is_allowed_loads_the_stubs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        allowed = re.search(r"^Requires-Dist: grpcio>=(\S+)$", archive.read(metadata).decode(), re.MULTILINE)
    assert allowed is not None
    assert allowed[1] == chat_pb2_grpc.GRPC_GENERATED_VERSION


def test_a_base_installation_is_the_client_alone(installed: Path, tmp_path: Path) -> None:
    listing = _run(installed / "python", "-m", "pip", "list", "--format", "freeze", cwd=tmp_path)
    names = {line.partition("==")[0].lower() for line in listing.split()}
    assert "parley" in names
    assert names <= {
        "googleapis-common-protos",
        "grpcio",
        "grpcio-health-checking",
        "parley",
        "pip",
        "protobuf",
        "setuptools",
        "typing_extensions",
    }


def test_a_base_installation_imports_and_runs_the_client(installed: Path, tmp_path: Path) -> None:
    _run(installed / "python", "-c", "import parley_client, parley.v1.chat_pb2_grpc", cwd=tmp_path)
    assert "usage: parley" in _run(installed / "parley", "--help", cwd=tmp_path)


def test_without_the_extra_the_service_says_what_is_missing(installed: Path, tmp_path: Path) -> None:
    assert "usage: parleyd" in _run(installed / "parleyd", "--help", cwd=tmp_path)
    command = [installed / "parleyd", "serve", "--port", "0"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "run `pip install '.[service]'` in Parley's folder" in result.stderr
    assert "Traceback" not in result.stderr


def test_keys_are_made_without_the_service(installed: Path, tmp_path: Path) -> None:
    entry = _run(installed / "parleyd", "keys", "new", "--name", "billing", cwd=tmp_path)
    assert entry.startswith('[[key]]\nname = "billing"\n')
