"""How much memory a device has free, and the check that the weights fit before any is loaded."""

from __future__ import annotations

import psutil  # type: ignore[import-untyped]
import torch

from parleyd.errors import StartupError
from parleyd.model.cgroup import free_memory
from parleyd.model.explain import gib

# Of a GPU's free memory, what weights may take that are put onto it alone: a KV cache must fit beside them.
_WEIGHTS_SHARE = 0.8
_SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")


def check_device_map(device_map: str) -> None:
    """Raises StartupError where `device_map` is neither a placement of accelerate nor a CPU or CUDA that is here."""
    if device_map in _SPREADING:
        return
    try:
        device = torch.device(device_map)
        if device.type not in ("cpu", "cuda"):  # on mps, transformers' streams lag a step behind the logits
            raise ValueError("neither a CPU nor CUDA")
        torch.empty(0, device=device)
    except Exception as error:  # by device, torch raises AssertionError, RuntimeError, AcceleratorError, …
        reason = str(error).strip().splitlines()[0]
        raise StartupError(
            f"--device-map {device_map}: no device to serve from ({reason}); use {', '.join(_SPREADING)}, cpu or cuda:N"
        ) from error


def is_on_cpu(device_map: str) -> bool:
    """Whether that is where `device_map` puts a model here."""
    return device_map == "cpu" or not torch.cuda.is_available()


def placement(device_map: str, num_bytes: int) -> str:
    """Where weights of `num_bytes` go. Of several GPUs "auto" takes the one with the most room, if that is enough:
    transformers would spread them over all, and engine `batching` drives one. Without CUDA it would find others."""
    if is_on_cpu(device_map):
        return "cpu"
    num_gpus = torch.cuda.device_count()
    if device_map != "auto" or num_gpus < 2:
        return device_map
    free = [torch.cuda.mem_get_info(gpu)[0] for gpu in range(num_gpus)]
    return f"cuda:{free.index(max(free))}" if num_bytes <= max(free) * _WEIGHTS_SHARE else device_map


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


def free_main_memory() -> int:
    """Bytes that this process can still take: what the machine has free, or less where a limit is nearer."""
    free = int(psutil.virtual_memory().available)
    limited = free_memory()
    return max(free if limited is None else min(free, limited), 0)
