"""Folders made once and kept: a folder appears whole under its final name, or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from parleyd.errors import StartupError

_logger = logging.getLogger("parleyd.model")

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TEMPORARY = ".making-"


def cache_root(cache: str | None) -> Path:
    """The folder of `--cache`, where cli.py has put $XDG_CACHE_HOME/parley if it is set, else ~/.cache/parley."""
    return Path(cache) if cache else Path.home() / ".cache" / "parley"


def cache_key(version: str, *files: Path) -> str:
    """Changes when a file is replaced, touched or moved, and with the version of the code that reads them."""
    digest = hashlib.blake2b(version.encode(), digest_size=8)
    for file in files:
        stat = file.stat()
        digest.update(f"|{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def cached_folder(root: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The folder `root/name`, filled by `build` unless it is there already.

    `build` works in a temporary folder beside it, renamed once all of it is on disk. A process that finds another one
    building waits for it. Raises StartupError where the folder cannot be written; anything else that `build` raises
    passes through. Neither leaves anything behind.
    """
    final = root / name
    if final.is_dir():
        return final
    with _explained(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = _acquire(root)
    with lock:
        if not final.is_dir():
            _build(root, final, build)
    return final


def _acquire(root: Path) -> contextlib.AbstractContextManager[object]:
    """One lock for the whole cache: the kernel lets go of it when its owner dies, however it dies."""
    lock = filelock.FileLock(root / ".lock")
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        _logger.info("waiting for another process that is filling %s", root)
        return lock.acquire()


def _build(root: Path, final: Path, build: Callable[[Path], None]) -> None:
    temporary = root / (_TEMPORARY + final.name)
    with _explained(root):
        for stale in root.glob(_TEMPORARY + "*"):  # this process holds the lock, so whoever made them is dead
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
    try:
        with _explained(root, only_full_disk=True):
            build(temporary)
        with _explained(root):
            for path in (*temporary.rglob("*"), temporary):
                _sync(path)
            temporary.rename(final)
            _sync(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _explained(root: Path, only_full_disk: bool = False) -> Iterator[None]:
    """Turns failures to write into one line for the operator."""
    try:
        yield
    except Exception as error:
        if full := _full_disk(error):
            raise StartupError(
                f"cannot write the cache folder {root}: {full}; make room there, or name another folder with --cache"
            ) from error
        if only_full_disk or not isinstance(error, OSError):
            raise
        raise StartupError(
            f"cannot write the cache folder {root}: {error.strerror or error}; name another folder with --cache"
        ) from error


def _full_disk(error: Exception) -> str | None:
    """What the system says of a full disk. safetensors, written in Rust, tells it as text: "... (os error 28)"."""
    for number in _FULL_DISK:
        if getattr(error, "errno", None) == number or f"(os error {number})" in str(error):
            return os.strerror(number)
    return None
