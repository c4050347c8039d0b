"""Checks who imports whom (`make verify-layers`): docs/architecture.md's table of rooms, as code.

Every import counts, also those inside functions, under TYPE_CHECKING and through `importlib.import_module("…")`. A room
may import itself, the standard library less what it must not, and what its row names; anything else is a violation.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHELVES = ("protos/gen/python", "clients/python", "service")

# What the engine's rooms know of; they are given their parts, and read no settings.
REQUESTS = ("parleyd.errors", "parleyd.generation")
SETTINGS = ("parleyd.config", *REQUESTS)
STUBS = ("parley", "grpc", "google")


@dataclass(frozen=True)
class Room:
    """Some modules (and what is below them), and the dotted names that they may import beside each other's."""

    modules: tuple[str, ...]
    imports: tuple[str, ...] = ()
    never: tuple[str, ...] = ()


# The most specific room that holds a module is its room.
ROOMS = (
    Room(("parley",), imports=("grpc", "google")),
    Room(("parley_client",), imports=(*STUBS, "grpc_health")),
    Room(("parley_command",), imports=("parley_client.cli",)),
    Room(SETTINGS),
    Room(("parleyd.ipc",), imports=("msgspec", *SETTINGS)),
    Room(
        ("parleyd.telemetry",),
        imports=("prometheus_client", "opentelemetry", "pythonjsonlogger", *SETTINGS),
    ),
    Room(("parleyd.security",), imports=("cryptography", "grpc", "jwt", "msgspec", *SETTINGS)),
    Room(("parleyd.grammar",), imports=("llguidance", "numpy", "parleyd.ipc", "parleyd.text.tokenizer", *SETTINGS)),
    Room(("parleyd.text",), imports=("tokenizers", "jinja2", "regex", "transformers.utils", *SETTINGS)),
    Room(("parleyd.scheduling",), imports=REQUESTS),
    Room(("parleyd.cpu_kernels",), imports=("torch", "numpy", "numba", "llvmlite")),
    Room(("parleyd.gpu_kernels",), imports=("torch", "triton")),
    Room(
        ("parleyd.model",),
        imports=(
            "torch",
            "numpy",
            "transformers",
            "tokenizers",
            "safetensors",
            "gguf",
            "huggingface_hub",
            "torchao",
            "msgspec",
            "filelock",
            "psutil",
            "parleyd.cpu_kernels",
            *SETTINGS,
        ),
        never=("asyncio",),
    ),
    Room(
        ("parleyd.sampling",),
        imports=("torch", "numpy", "parleyd.grammar.state", "parleyd.model.upload", *REQUESTS),
    ),
    Room(
        ("parleyd.kernels",),
        imports=(
            "torch",
            "numpy",
            "numba",
            "parleyd.cpu_kernels",
            "parleyd.gpu_kernels",
            "parleyd.model.cache",
            "parleyd.model.upload",
            "parleyd.scheduling",
            *REQUESTS,
        ),
    ),
    Room(
        ("parleyd.engine",),
        imports=(
            "torch",
            "numpy",
            "transformers",
            "parleyd.cpu_kernels",
            "parleyd.grammar",
            "parleyd.kernels",
            "parleyd.model",
            "parleyd.sampling",
            "parleyd.scheduling",
            *REQUESTS,
        ),
        never=("asyncio",),
    ),
    Room(
        ("parleyd.worker",),
        imports=(
            "torch",
            "transformers",
            "psutil",
            "parleyd.engine",
            "parleyd.grammar",
            "parleyd.ipc",
            "parleyd.kernels",
            "parleyd.model",
            "parleyd.scheduling",
            "parleyd.telemetry",
            *SETTINGS,
        ),
    ),
    Room(
        ("parleyd.gateway", "parleyd.rpc"),
        imports=(
            *STUBS,
            "grpc_health",
            "grpc_reflection",
            "psutil",
            "parleyd.ipc",
            "parleyd.security",
            "parleyd.telemetry",
            "parleyd.text",
            *SETTINGS,
        ),
    ),
    Room(
        ("parleyd", "parleyd.cli", "parleyd.__main__"),
        imports=("parleyd.gateway", "parleyd.security", "parleyd.telemetry", *SETTINGS),
    ),
)

# What a process is told from outside is read in one place, so that everything else can be tested without it.
READERS = ("cli.py", "__main__.py")
OUTSIDE = {"os": ("environ", "environb", "getenv", "getenvb"), "sys": ("argv", "orig_argv")}


@dataclass(frozen=True)
class Violation:
    """One forbidden import or read; prints as compilers print theirs."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def verify_tree(root: Path) -> list[Violation]:
    """The violations in all our packages below `root`."""
    violations = []
    for shelf in SHELVES:
        for path in sorted((root / shelf).rglob("*.py")):
            module = _module_of(path.relative_to(root / shelf))
            violations += verify_module(path.read_text(), module, str(path.relative_to(root)))
    return violations


def verify_module(source: str, module: str, path: str) -> list[Violation]:
    """The violations in one module. `module` is its dotted name, `parleyd.text` for a package's `__init__.py`."""
    tree = ast.parse(source, path)
    room = _room_of(module)
    if room is None:
        return [Violation(path, 1, f"{module} is in no room: give it one in tools/verify_layers.py")]
    package = module if Path(path).name == "__init__.py" else module.rpartition(".")[0]
    violations = [
        Violation(path, line, f"{module} must not import {name}")
        for line, name in _imports(tree, package)
        if not _may_import(room, name)
    ]
    if Path(path).name not in READERS:
        violations += [
            Violation(path, line, f"only {' and '.join(READERS)} read {name}") for line, name in _outside_reads(tree)
        ]
    return violations


def _module_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _room_of(module: str) -> Room | None:
    rooms = [
        (len(prefix), room)
        for room in ROOMS
        for prefix in room.modules
        # The bare package is no room for what is below it: a new folder has to be given one.
        if module == prefix or (_is_within(module, prefix) and prefix != "parleyd")
    ]
    return max(rooms, key=lambda entry: entry[0])[1] if rooms else None


def _may_import(room: Room, name: str) -> bool:
    if any(_is_within(name, prefix) for prefix in room.never):
        return False
    if name.partition(".")[0] in sys.stdlib_module_names:
        return True
    allowed = (*room.imports, *(module for module in room.modules if module != "parleyd"))
    return any(_is_within(name, prefix) for prefix in allowed)


def _imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import; `from a import b` gives `a.b`, which may be a module."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield node.lineno, alias.name
            case ast.ImportFrom(module=module, names=names, level=level):
                base = module or ""
                if level:
                    parents = package.split(".")[: len(package.split(".")) - (level - 1)]
                    base = ".".join([*parents, base] if base else parents)
                for alias in names:
                    yield node.lineno, base if alias.name == "*" else f"{base}.{alias.name}"
            case ast.Call(func=ast.Name(id="__import__" | "import_module"), args=[ast.Constant(value=str(name)), *_]):
                yield node.lineno, name
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                yield node.lineno, name


def _outside_reads(tree: ast.AST) -> Iterator[tuple[int, str]]:
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname or alias.name: alias.name for alias in node.names if alias.name in OUTSIDE}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=alias), attr=attr) if attr in OUTSIDE.get(aliases.get(alias, ""), ()):
                yield node.lineno, f"{aliases[alias]}.{attr}"
            case ast.ImportFrom(module=str(module), names=names, level=0) if module in OUTSIDE:
                for name in names:
                    if name.name in OUTSIDE[module]:
                        yield node.lineno, f"{module}.{name.name}"


def main() -> int:
    """Prints the violations. The exit code is 1 if there are any."""
    violations = verify_tree(ROOT)
    for violation in violations:
        print(violation)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
