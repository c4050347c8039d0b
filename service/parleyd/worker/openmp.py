"""How the threads that torch computes with on a CPU wait, and where they run: to be set before it is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import psutil  # type: ignore[import-untyped]

_HYPERTHREADING = Path("/sys/devices/system/cpu/smt/active")


def openmp_variables(
    environ: Mapping[str, str], bind_threads: bool = True, cpu_quota: float | None = None
) -> dict[str, str]:
    """What to add to the environment. What the operator has set in it stays.

    `cpu_quota`: how many processors' time this process may take.
    """
    variables = {}
    # They wait by spinning. Where anything else uses the cores, that makes a forward pass tens of times slower: spin
    # briefly, then sleep.
    if "OMP_WAIT_POLICY" not in environ:
        variables["GOMP_SPINCOUNT"] = "1000"
    if {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}.isdisjoint(environ):
        # With more threads than the quota keeps busy, all of them stand still for the rest of each period of 100 ms
        # once it is used up, and some for those that wait for others.
        if cpu_quota is not None and cpu_quota < _num_cores():
            variables["OMP_NUM_THREADS"] = str(max(int(cpu_quota), 1))
        # Whatever wakes up, such as the gateway at each token, has the kernel move threads about: two of them on one
        # processor then wait for each other at every barrier, for as long as the kernel lets one run.
        elif bind_threads and _is_one_thread_a_core():
            variables["OMP_PROC_BIND"] = "true"
    return {name: value for name, value in variables.items() if name not in environ}


def _num_cores() -> int:
    """On how many threads torch computes, if nobody says anything else."""
    num_processors = len(os.sched_getaffinity(0))
    return min(psutil.cpu_count(logical=False) or num_processors, num_processors)


def _is_one_thread_a_core() -> bool:
    """Whether there are as many processors as torch takes threads. Fewer threads would all be bound to the first
    processors, as would those of every other process like this one."""
    return _HYPERTHREADING.is_file() and _HYPERTHREADING.read_text().strip() == "0"
