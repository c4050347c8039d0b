"""Files that may be replaced while the service runs: certificates, keys."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from parleyd.errors import StartupError

_logger = logging.getLogger("parleyd.security")

T = TypeVar("T")


class Watched(Generic[T]):
    """What `read` makes of some files. The first reading may raise StartupError, a later one keeps the last value."""

    def __init__(self, paths: Sequence[str], read: Callable[[], T]) -> None:
        self._paths = [Path(path) for path in paths]
        self._read = read
        self._seen = self._failed = self._state()
        self.value = read()

    def refresh(self) -> bool:
        """Reads the files again if they have changed. Whether there is a new value."""
        state = self._state()
        if state == self._seen:
            return False
        try:
            self.value = self._read()
        except Exception as error:  # nothing that stands in a file may end the watching
            # Tried again each time: it may be for want of a permission or of file descriptors.
            if state != self._failed:
                self._failed = state
                _logger.error("%s; what was read before stays in use", error)
            return False
        self._seen = self._failed = state
        _logger.info("read again: %s", ", ".join(map(str, self._paths)))
        return True

    def _state(self) -> list[tuple[int, int, int] | None]:
        return [_state_of(path) for path in self._paths]


def read_file(flag: str, path: str) -> bytes:
    """A file's content. Raises StartupError that names flag and file."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise StartupError(f"{flag} {path} cannot be read: {error.strerror or error}") from error


def _state_of(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
