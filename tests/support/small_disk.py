"""A disk that can be full: a tiny file system of its own, or, where mounting is not permitted, what comes close."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# In a mount namespace, for which no privileges are needed where the system permits it. Others reach it through the
# process that holds it, which leaves, and the disk with it, at the end of its standard input.
_MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$2" && echo ready && exec cat'
_HOLD = f"""exec unshare --user --map-root-user --mount sh -c '{_MOUNT}' sh "$@" 2>/dev/null"""
# A process that can write no file of more than 4 KiB: it fails as at a full disk.
_SMALL_FILES = ("sh", "-c", 'ulimit -f 8 && exec "$@"', "sh")
_FILLER, _LOCK = "filler", ".lock"


class SmallDisk:
    """`folder` is on it. A command that is to find the disk full must begin with `prefix`, empty as a rule."""

    def __init__(self, folder: Path, prefix: Sequence[str] = ()) -> None:
        self.folder = folder
        self.prefix = tuple(prefix)

    def fill(self, room_bytes: int = 0) -> None:
        """Takes all of it, or all but so much."""
        if self.prefix:
            return
        with (self.folder / _FILLER).open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC
            file.truncate(file.tell() - room_bytes)

    def contents(self) -> list[str]:
        """The names of all that others have put there, but for their lock."""
        return sorted(path.name for path in self.folder.iterdir() if path.name not in (_FILLER, _LOCK))


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[SmallDisk]:
    """`folder` is where it is mounted, and made here."""
    folder.mkdir()
    command = ["sh", "-c", _HOLD, "sh", str(num_bytes), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        if holder.stdout.readline():
            yield SmallDisk(Path(f"/proc/{holder.pid}/root{folder}"))
        else:
            yield SmallDisk(folder, _SMALL_FILES)
