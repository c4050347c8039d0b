"""Generates the Python stubs from protos/parley, or verifies that the committed ones are what would be generated.

Run by `make fix-protos` and `make verify-protos` with grpcio-tools and mypy-protobuf (requirements-protos.txt).
"""

from __future__ import annotations

import difflib
import re
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
STUBS = PROTOS / "gen" / "python"
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(target: Path) -> None:
    """Writes the stubs below `target`. Only files with a service get a `_pb2_grpc.py`, and its types."""
    protos = sorted((PROTOS / "parley").rglob("*.proto"))
    with_service = [path for path in protos if re.search(r"^service ", path.read_text(), re.MULTILINE)]
    _protoc(protos, f"--python_out={target}", f"--pyi_out={target}")
    plugin = Path(sys.executable).with_name("protoc-gen-mypy_grpc")
    types = [f"--plugin=protoc-gen-mypy_grpc={plugin}", f"--mypy_grpc_out=quiet:{target}"]
    _protoc(with_service, f"--grpc_python_out={target}", *types)


def _protoc(protos: list[Path], *outputs: str) -> None:
    google = Path(grpc_tools.__file__).parent / "_proto"
    names = [str(path.relative_to(PROTOS)) for path in protos]
    if protoc.main(["protoc", f"-I{PROTOS}", f"-I{google}", *outputs, *names]) != 0:
        sys.exit("protoc failed")


def _generated(folder: Path) -> dict[Path, Path]:
    return {path.relative_to(folder): path for pattern in GENERATED for path in folder.rglob(pattern)}


def fix() -> None:
    """Replaces the committed stubs."""
    for path in _generated(STUBS).values():
        path.unlink()
    generate(STUBS)


def verify() -> int:
    """Prints how the committed stubs differ from generated ones. The exit code is 1 if they do."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        committed, expected = _generated(STUBS), _generated(Path(folder))
        differences: list[str] = []
        for name in sorted(committed.keys() | expected.keys()):
            texts = [side[name].read_text().splitlines() if name in side else [] for side in (committed, expected)]
            differences += difflib.unified_diff(*texts, f"committed {name}", f"generated {name}", lineterm="")
    for line in differences[:100]:
        print(line)
    if differences:
        print("protos/gen/python is not what protos/parley generates: run `make fix-protos`", file=sys.stderr)
    return 1 if differences else 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["fix"]:
            fix()
        case ["verify"]:
            sys.exit(verify())
        case _:
            sys.exit(f"usage: {sys.argv[0]} fix|verify")
