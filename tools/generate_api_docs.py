"""Writes docs/api.md from the protos' comments and tests/field_tests.toml; with --check tells whether it is current.

Run by `make fix-docs` and `make verify-docs`. Either way every field must have a test, and every test named must exist.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

from parley_client.errors import BY_REASON
from parleyd.errors import Reason
from parleyd.rpc.status import CODES

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "api.md"
TESTS = ROOT / "tests"
FIELD_TESTS = TESTS / "field_tests.toml"
BUF = str(Path(sys.executable).parent / "buf")
FILES = ("chat", "generation", "message", "errors")

HEAD = """\
# API

<!-- Generated from protos/parley/v1 and tests/field_tests.toml by `make fix-docs`; edit those instead. -->
"""

# Numbers of fields in descriptor.proto, of which the paths of comments are made.
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6
_FIELDS, _ENUM_VALUES, _METHODS, _NESTED_ENUMS = 2, 2, 2, 4
_SYNTAX = (12,)

_DEFAULT = re.compile(r"\s*\bDefault: (.+?)\.(?=\s|$)", re.DOTALL)


class ProtoFile:
    """A proto file and its comments."""

    def __init__(self, proto: FileDescriptorProto) -> None:
        self.proto = proto
        self._locations = {tuple(location.path): location for location in proto.source_code_info.location}

    def comment(self, *path: int) -> str:
        """The comment of what lies at a path, in one line but for paragraphs."""
        return _unwrap(self._locations[path].leading_comments) if path in self._locations else ""

    @property
    def head(self) -> str:
        """The comment that the file begins with."""
        return self.comment(*_SYNTAX)


def load() -> dict[str, ProtoFile]:
    """The contract's files by their short names."""
    command = [BUF, "build", "protos", "--path", "protos/parley", "-o", "-"]
    image = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    files = {file.name: ProtoFile(file) for file in FileDescriptorSet.FromString(image).file}
    return {name: files[f"parley/v1/{name}.proto"] for name in FILES}


def render(files: dict[str, ProtoFile], field_tests: dict[str, dict[str, list[str]]]) -> str:
    """The page."""
    chat = files["chat"]
    return "".join(
        [
            f"{HEAD}\n{chat.head}\n",
            *_services(chat),
            *(part for file in files.values() for part in (*_messages(file), *_enums(file))),
            *_errors(files["errors"]),
            *_tests(files, field_tests),
        ]
    )


def _services(file: ProtoFile) -> Iterator[str]:
    for i, service in enumerate(file.proto.service):
        yield f"\n## {service.name}\n\n{file.comment(_SERVICES, i)}\n\n"
        rows = []
        for j, method in enumerate(service.method):
            answer = f"{'stream of ' if method.server_streaming else ''}{_link(method.output_type)}"
            meaning = file.comment(_SERVICES, i, _METHODS, j)
            rows.append((f"`{method.name}`", _link(method.input_type), answer, meaning))
        yield _table(("RPC", "request", "answer", "meaning"), rows)


def _messages(file: ProtoFile) -> Iterator[str]:
    for i, message in enumerate(file.proto.message_type):
        yield f"\n## {message.name}\n\n{file.comment(_MESSAGES, i)}\n"
        rows = []
        for j, field in enumerate(message.field):
            meaning, default = _split_default(file.comment(_MESSAGES, i, _FIELDS, j))
            rows.append((f"`{field.name}`", _type(message, field), default, meaning))
        if any(default for _, _, default, _ in rows):
            yield "\n" + _table(("field", "type", "default", "meaning"), rows)
        elif rows:
            yield "\n" + _table(("field", "type", "meaning"), [(name, kind, text) for name, kind, _, text in rows])
        for j, enum in enumerate(message.enum_type):
            yield from _enum(file, enum, f"{message.name}.{enum.name}", (_MESSAGES, i, _NESTED_ENUMS, j))


def _enums(file: ProtoFile) -> Iterator[str]:
    for i, enum in enumerate(file.proto.enum_type):
        if enum.name != "ErrorReason":
            yield from _enum(file, enum, enum.name, (_ENUMS, i))


def _enum(file: ProtoFile, enum: EnumDescriptorProto, name: str, path: tuple[int, ...]) -> Iterator[str]:
    yield f"\n## {name}\n\n{file.comment(*path)}\n\n"
    rows = [
        (f"`{value.name}`", str(value.number), file.comment(*path, _ENUM_VALUES, i))
        for i, value in enumerate(enum.value)
    ]
    yield _table(("value", "number", "meaning"), rows)


def _errors(file: ProtoFile) -> Iterator[str]:
    """The reasons with the codes and classes that the code itself has for them."""
    yield f"\n## Errors\n\n{file.comment(_ENUMS, 0)}\n\n"
    rows = []
    for i, value in enumerate(file.proto.enum_type[0].value):
        reason = value.name.removeprefix("ERROR_REASON_")
        code, _, meaning = file.comment(_ENUMS, 0, _ENUM_VALUES, i).partition(": ")
        if value.number == 0:
            continue
        if reason in Reason.__members__ and code != CODES[Reason[reason]].name:
            sys.exit(f"errors.proto says {code} for {reason}, rpc/status.py says {CODES[Reason[reason]].name}")
        rows.append((f"`{reason}`", f"`{code}`", f"`{BY_REASON[reason].__name__}`", meaning[0].upper() + meaning[1:]))
    yield _table(("reason", "status code", "in Python", "meaning"), rows)


def _tests(files: dict[str, ProtoFile], field_tests: dict[str, dict[str, list[str]]]) -> Iterator[str]:
    yield "\n## Tests\n\nWhat would fail if a field did not do what it says.\n\n"
    rows = []
    for message in _all_messages(files):
        for field in message.field:
            tests = field_tests[message.name][field.name]
            links = (f"[{test.rpartition('::')[2]}](../tests/{test.partition('::')[0]})" for test in tests)
            rows.append((f"`{message.name}.{field.name}`", "<br>".join(links)))
    yield _table(("field", "tests"), rows)


def check_field_tests(files: dict[str, ProtoFile], field_tests: dict[str, dict[str, list[str]]]) -> list[str]:
    """One line for each field without a test, test that is not there, and entry for a field that is not there."""
    fields = {(message.name, field.name) for message in _all_messages(files) for field in message.field}
    listed = {(message, field) for message, tests in field_tests.items() for field in tests}
    complaints = [f"{message}.{field} has no test" for message, field in sorted(fields - listed)]
    complaints += [f"{message}.{field} is no field" for message, field in sorted(listed - fields)]
    for message, field in sorted(listed):
        tests = field_tests[message][field]
        complaints += [f"{message}.{field}: there is no {test}" for test in tests if not _exists(test)]
        if not any(_names(test, field) for test in tests):
            complaints.append(f"{message}.{field}: none of its tests' files names it")
    return complaints


def _names(test: str, field: str) -> bool:
    """Whether the file of a test, which may hold its parameters, has the field's name in it."""
    path = TESTS / test.partition("::")[0]
    return path.is_file() and re.search(rf"\b{field}\b", path.read_text()) is not None


def _exists(test: str) -> bool:
    path, _, name = test.partition("::")
    return name in _test_names(TESTS / path)


@cache
def _test_names(path: Path) -> frozenset[str]:
    if not path.is_file():
        return frozenset()
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, functions))


def _all_messages(files: dict[str, ProtoFile]) -> Iterator[DescriptorProto]:
    for file in files.values():
        yield from file.proto.message_type


def _type(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    nested = {nested.name: nested for nested in message.nested_type}
    entry = nested.get(field.type_name.rpartition(".")[2])
    if entry is not None and entry.options.map_entry:
        key, value = (_scalar(part) for part in entry.field)
        return f"map of {key} to {value}"
    kind = _link(field.type_name) if field.type_name else _scalar(field)
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {kind}"
    if field.proto3_optional:
        return f"optional {kind}"
    if field.HasField("oneof_index"):
        return f"{kind}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return kind


def _scalar(field: FieldDescriptorProto) -> str:
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def _link(type_name: str) -> str:
    name = type_name.removeprefix(".")
    short = name.removeprefix("parley.v1.")
    return f"`{name}`" if short == name else f"[{short}](#{short.lower().replace('.', '')})"


def _split_default(text: str) -> tuple[str, str]:
    """A comment without its `Default: …`, and that."""
    match = _DEFAULT.search(text)
    if match is None:
        return text, ""
    return (text[: match.start()] + text[match.end() :]).strip(), match[1]


def _unwrap(comment: str) -> str:
    paragraphs = comment.strip().split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: list[str]) -> int:
    """Writes the page, or compares it. The exit code is 1 if it is not current, or a field has no test."""
    files, field_tests = load(), tomllib.loads(FIELD_TESTS.read_text())
    if complaints := check_field_tests(files, field_tests):
        print(*(f"tests/field_tests.toml: {complaint}" for complaint in complaints), sep="\n", file=sys.stderr)
        return 1
    page = render(files, field_tests)
    if arguments != ["--check"]:
        TARGET.write_text(page)
        return 0
    if TARGET.exists() and TARGET.read_text() == page:
        return 0
    print("docs/api.md is not what the protos and tests/field_tests.toml say: run `make fix-docs`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
