"""How the threads that torch computes with on a CPU wait, and where they run: to be set before it is imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_HYPERTHREADING = Path("/sys/devices/system/cpu/smt/active")


def openmp_variables(environ: Mapping[str, str], bind_threads: bool = True) -> dict[str, str]:
    """What to add to the environment. What the operator has set in it stays."""
    variables = {}
    # They wait by spinning. Where anything else uses the cores, that makes a forward pass tens of times slower: spin
    # briefly, then sleep.
    if "OMP_WAIT_POLICY" not in environ:
        variables["GOMP_SPINCOUNT"] = "1000"
    # Whatever wakes up, such as the gateway at each token, has the kernel move threads about: two of them on one
    # processor then wait for each other at every barrier, for as long as the kernel lets one run.
    if bind_threads and _has_processor_for_each_thread(environ):
        variables["OMP_PROC_BIND"] = "true"
    return {name: value for name, value in variables.items() if name not in environ}


def _has_processor_for_each_thread(environ: Mapping[str, str]) -> bool:
    """Whether torch, which computes on one thread for each core, will have as many as there are processors for it.
    Fewer would all be bound to the first processors, as would those of every other process like this one."""
    has_limit = not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}.isdisjoint(environ)
    return not has_limit and _HYPERTHREADING.is_file() and _HYPERTHREADING.read_text().strip() == "0"
