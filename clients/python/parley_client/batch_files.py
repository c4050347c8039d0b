"""The files of `parley batch`: requests in, one JSON object a line, and their results out."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias

from google.protobuf import json_format

from parley.v1 import chat_pb2

Key: TypeAlias = str | int
"""What tells an item from all others: its `id`, else the number of its line."""

_MAX_BAD_LINES = 20
_REFUSALS = (ValueError, RecursionError, json_format.ParseError)


class BadFile(ValueError):
    """A file is not what it must be. The text has one line for each thing wrong, with the line's number."""


@dataclass
class Item:
    """A line of the input."""

    line: int
    id: str | None
    request: chat_pb2.GenerateRequest
    tries: int = 0

    @property
    def key(self) -> Key:
        return self.line if self.id is None else self.id


def read_items(path: Path) -> Iterator[Item]:
    """The items of a JSONL file; blank lines are passed over. Raises BadFile at the first bad line."""
    for line, text in _lines(path):
        if not text.strip():
            continue
        try:
            yield _parse(line, text)
        except _REFUSALS as error:
            raise BadFile(f"{path}:{line}: {_one_line(error)}") from error


def check_input(path: Path) -> set[Key]:
    """The keys of a file's items. Raises BadFile with its first bad lines."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise BadFile(f"{path}: is a pipe or device, and the input is read twice: write it to a file first")
    keys: dict[Key, int] = {}
    bad = []
    for line, text in _lines(path):
        if not text.strip():
            continue
        try:
            key = _parse(line, text).key
        except _REFUSALS as error:
            bad.append(f"{path}:{line}: {_one_line(error)}")
        else:
            if key in keys:
                bad.append(f"{path}:{line}: the id {key!r} is that of line {keys[key]} already")
            keys[key] = line
        if len(bad) == _MAX_BAD_LINES:
            break
    if bad:
        raise BadFile("\n".join(bad))
    return set(keys)


def _parse(line: int, text: bytes) -> Item:
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError("is no JSON object")
    id = fields.pop("id", None)
    if not (id is None or isinstance(id, str)):
        raise ValueError("id: must be a string")
    if id is not None and any("\ud800" <= character <= "\udfff" for character in id):
        raise ValueError("id: holds a lone surrogate, which no file can")
    return Item(line, id, json_format.ParseDict(fields, chat_pb2.GenerateRequest()))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            yield from enumerate(file, start=1)
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class ResultFile:
    """The output: one line a result, each written whole. Opened again, it knows which items have been answered.

    Failed items and a line that a killed run left torn are taken out when it is opened, to be asked again. It is locked
    while it is open: of two runs that write into one file at once, one would lose its results.
    """

    def __init__(self, path: Path, keys: set[Key]) -> None:
        self.answered: set[Key] = set()
        try:
            with _open_locked(path):
                if path.is_file():
                    path = path.resolve()  # of a link, the file that it leads to is replaced
                    self._keep_answers(path, keys)
                self._file = _open_locked(path)
        except OSError as error:
            raise BadFile(f"{path}: {error.strerror}") from error

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, item: Item, result: dict[str, Any]) -> None:
        """Appends one line."""
        head = {"line": item.line} if item.id is None else {"line": item.line, "id": item.id}
        line = json.dumps({**head, **result}, ensure_ascii=False).encode() + b"\n"
        num_written = self._file.write(line)
        if num_written != len(line):
            with suppress(OSError):  # a pipe keeps what it has
                self._file.truncate(self._file.tell() - num_written)  # or the next line would stand behind a torn one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _keep_answers(self, path: Path, keys: set[Key]) -> None:
        kept = path.with_name(path.name + ".tmp")
        try:
            with kept.open("wb") as file:
                shutil.copymode(path, kept)
                for line, text in _lines(path):
                    if not text.endswith(b"\n"):
                        break
                    key, is_answered = _parse_result(f"{path}:{line}", text, keys)
                    if is_answered:
                        self.answered.add(key)
                        file.write(text)
            os.replace(kept, path)
        except BaseException:
            kept.unlink(missing_ok=True)
            raise


def _open_locked(path: Path) -> FileIO:
    """Opens a file to append to. Raises BadFile where another run has it; devices anyone may share."""
    file = path.open("ab", buffering=0)
    # A run replaces the file as it begins: the one that we have locked may no longer be the one that is there.
    if path.is_file() and not (_lock(file) and os.path.samestat(os.fstat(file.fileno()), path.stat())):
        file.close()
        raise BadFile(f"{path}: another `parley batch` is writing it")
    return file


def _lock(file: FileIO) -> bool:
    """Whether the file is ours alone now, until it is closed."""
    try:
        import fcntl
    except ImportError:  # Windows has none
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _parse_result(place: str, text: bytes, keys: set[Key]) -> tuple[Key, bool]:
    try:
        result = json.loads(text)
        if "line" not in result or ("response" in result) == ("error" in result):  # a request may have an id too
            raise ValueError
        key = result.get("id", result["line"])
        is_known = key in keys
    except (ValueError, TypeError, AttributeError) as error:
        raise BadFile(f"{place}: is no result of `parley batch`: name another output, or remove the file") from error
    if not is_known:
        raise BadFile(f"{place}: answers {key!r}, which the input does not hold: these files do not belong together")
    return key, "response" in result
