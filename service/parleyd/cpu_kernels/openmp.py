"""Torch's own OpenMP threads: the library that has them, and where they run."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def openmp() -> ctypes.CDLL:
    """GNU's, as torch brings it. Raises OSError where it brings another, or none."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    if not found:
        raise OSError("torch brings no libgomp")
    library = ctypes.CDLL(str(found[0]))
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    return library


def bind_threads() -> bool:
    """Gives each of the threads that torch computes with for the calling one, itself among them, a CPU of its own.

    Else whatever wakes up, such as the gateway at each token, has the kernel move them about: two of them on one CPU
    then wait for each other at every barrier, for as long as the kernel lets one run. Returns whether it was done: only
    where there are as many threads as CPUs, as fewer of several processes would all be bound to the same.
    """
    if not hasattr(os, "sched_setaffinity"):
        return False
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) != torch.get_num_threads():  # so too where OMP_PROC_BIND has bound them
        return False
    try:
        library = openmp()
    except OSError:
        return False
    # Of pid 0 the affinity is that of the thread that asks.
    region = _REGION(lambda _: os.sched_setaffinity(0, {cpus[library.omp_get_thread_num()]}))
    library.GOMP_parallel(ctypes.cast(region, ctypes.c_void_p), None, len(cpus), 0)
    return True
