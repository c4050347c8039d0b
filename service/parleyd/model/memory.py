"""How much memory a device has free, and the check that the weights fit before any is loaded."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from parleyd.errors import StartupError
from parleyd.model.explain import gib

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")


def check_device_map(device_map: str) -> None:
    """Raises StartupError where `device_map` is neither a placement of accelerate nor a device that is here."""
    if device_map in _SPREADING:
        return
    try:
        device = torch.device(device_map)
        if device.type == "meta":
            raise ValueError("it holds no weights")
        torch.empty(0, device=device)
    except Exception as error:  # by device, torch raises AssertionError, RuntimeError, AcceleratorError, …
        reason = str(error).strip().splitlines()[0]
        raise StartupError(
            f"--device-map {device_map}: no such device here ({reason}); use {', '.join(_SPREADING)}, cpu or cuda:N"
        ) from error


def is_on_cpu(device_map: str) -> bool:
    """Whether that is where `device_map` puts a model here."""
    return device_map == "cpu" or not torch.cuda.is_available()


def check_fits(model: str, num_bytes: int, device_map: str) -> None:
    """Raises StartupError where weights of `num_bytes` are more than is free where `device_map` puts them."""
    place, free = _free(device_map)
    if num_bytes > free:
        raise StartupError(
            f"--model {model}: the weights need {gib(num_bytes)} of memory, but {place} has {gib(free)} free; "
            "choose a smaller model, or a smaller type with --dtype"
        )


def _free(device_map: str) -> tuple[str, int]:
    """Name and free bytes of the place that `device_map` means."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device_map in _SPREADING:
        # What does not fit onto the accelerators, accelerate leaves in main memory.
        free = sum(torch.cuda.mem_get_info(index)[0] for index in range(num_gpus)) + free_main_memory()
        return ("main memory" if num_gpus == 0 else f"main memory with {num_gpus} GPU"), free
    device = torch.device(device_map)
    return device_map if device.type == "cuda" else "main memory", free_bytes(device)


def free_bytes(device: torch.device) -> int:
    """What is free where tensors of `device` live."""
    if device.type != "cuda":
        return free_main_memory()
    torch.cuda.empty_cache()  # what torch keeps of what has been freed, such as weights that are fused, counts as taken
    return torch.cuda.mem_get_info(device)[0]


def free_main_memory(cgroup_root: Path = _CGROUP_ROOT, own_cgroups: str | None = None) -> int:
    """Bytes that this process can still take: what the machine has free, or less where a container's limit is nearer.

    `own_cgroups` is the text of /proc/self/cgroup, given by tests.
    """
    free = int(psutil.virtual_memory().available)
    if own_cgroups is None:
        own_cgroups = _read(Path("/proc/self/cgroup"))
    for line in own_cgroups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            folder = cgroup_root / path.lstrip("/")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            folder = cgroup_root / "memory" / path.lstrip("/")
        else:
            continue
        for level in (folder, *folder.parents):  # any level above can be the tighter one
            if cgroup_root in (level, *level.parents):
                free = min(free, _free_in(level, *names, otherwise=free))
    return max(free, 0)


def _free_in(level: Path, limit_name: str, usage_name: str, cache_name: str, otherwise: int) -> int:
    limit, usage = _read(level / limit_name).strip(), _read(level / usage_name).strip()
    if not (limit.isdigit() and usage.isdigit()):  # no limit: "max", or no such file
        return otherwise
    # Pages of files count as used, but the kernel drops them as soon as something needs the room.
    cache = dict(line.split() for line in _read(level / "memory.stat").splitlines()).get(cache_name, "0")
    return int(limit) - int(usage) + int(cache)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
