"""What the control groups of a container, a pod or a unit leave of the machine to this process. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def cpu_quota(root: Path = _ROOT, own: str | None = None) -> float | None:
    """How many processors' time there is; None where nothing limits it. Parameters: see `_levels`."""
    quotas = []
    for level, is_unified in _levels("cpu", root, own):
        if is_unified:
            limits = _read(level / "cpu.max").split()
        else:
            limits = [_read(level / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if len(limits) == 2 and all(map(str.isdigit, limits)):  # else no limit: "max", -1, or no such file
            quotas.append(int(limits[0]) / int(limits[1]))
    return min(quotas, default=None)


def free_memory(root: Path = _ROOT, own: str | None = None) -> int | None:
    """Bytes until a limit is reached; None where there is none. Parameters: see `_levels`."""
    free = []
    for level, is_unified in _levels("memory", root, own):
        if is_unified:
            names = ("memory.max", "memory.current", "inactive_file")
        else:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit, usage = _read(level / names[0]).strip(), _read(level / names[1]).strip()
        if limit.isdigit() and usage.isdigit():
            # Pages of files count as used, but the kernel drops them as soon as something needs the room.
            cache = dict(line.split() for line in _read(level / "memory.stat").splitlines()).get(names[2], "0")
            free.append(int(limit) - int(usage) + int(cache))
    return min(free, default=None)


def _levels(controller: str, root: Path, own: str | None) -> Iterator[tuple[Path, bool]]:
    """The groups that this process is in, and those around them: any may have the tightest limit. Each with whether its
    files are of the unified hierarchy (version 2).

    `own` is the text of /proc/self/cgroup, given by tests.
    """
    for line in (_read(Path("/proc/self/cgroup")) if own is None else own).splitlines():
        _, controllers, path = line.split(":", 2)
        is_unified = not controllers
        if is_unified or controller in controllers.split(","):
            folder = (root if is_unified else root / controller) / path.lstrip("/")
            for level in (folder, *folder.parents):
                yield level, is_unified


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
