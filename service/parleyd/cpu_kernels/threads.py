"""Runs compiled kernels on torch's own OpenMP threads.

A pool of our own would have its threads spin, waiting, on the cores on which torch's compute.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from numba import cfunc, config, types
from numba.core.caching import UserProvidedCacheLocator

from parleyd.cpu_kernels.numbers import FAST

_logger = logging.getLogger("parleyd.engine")

# Known to the linker as soon as `_openmp` has run.
thread_index = types.ExternalFunction("omp_get_thread_num", types.int32())
num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())
# Returns when all threads of the kernel have come there.
barrier = types.ExternalFunction("GOMP_barrier", types.void())


class Function:
    """A part of kernels, compiled once for all of them: they `numbers.call` its address. Its arguments are int64."""

    def __init__(self, function: Callable[..., None]) -> None:
        """Compiles it, or finds it compiled in the cache."""
        num_arguments = function.__code__.co_argcount
        self._compiled = _compile(types.void(*[types.int64] * num_arguments), function)

    @property
    def address(self) -> int:
        return int(self._compiled.address)


class Kernel:
    """A function of one array of int64 that each thread calls, to do its share: sizes, and addresses of tensors."""

    def __init__(self, function: Callable[..., None]) -> None:
        """Compiles it, or finds it compiled in the cache. Raises OSError where torch brings no OpenMP of GNU's."""
        self._parallel = _openmp().GOMP_parallel
        self._compiled = _compile("void(CPointer(int64))", function)

    def __call__(self, max_threads: int, *arguments: int) -> None:
        """Returns when all threads have, or the only one. `max_threads`: there is nothing to do for more.

        It is all of them or one: of a smaller team libgomp ends the others, and starts them anew for the next.
        """
        array = (ctypes.c_int64 * len(arguments))(*arguments)
        self._parallel(self._compiled.address, array, torch.get_num_threads() if max_threads > 1 else 1, 0)


def bits_of(value: float) -> int:
    """A float32 as an argument of a kernel: see `float_argument`."""
    return int(np.float32(value).view(np.uint32))


class CacheLocator(UserProvidedCacheLocator):  # type: ignore[misc]
    """A folder that cannot be written too: it may hold all kernels already."""

    @classmethod
    def from_function(cls, py_func: Callable[..., None], py_file: str) -> CacheLocator:
        return cls(py_func, py_file)


def keep_compiled(folder: Path) -> None:
    """Keeps what is compiled from now on, for later processes, where the folder can be written."""
    config.CACHE_DIR, config.CACHE_LOCATOR_CLASSES = str(folder), f"{__name__}.{CacheLocator.__name__}"


def _compile(signature: Any, function: Callable[..., None]) -> Any:
    try:
        return cfunc(signature, cache=bool(config.CACHE_DIR), fastmath=FAST, error_model="numpy")(function)
    except OSError as error:  # it cannot be kept, which is known only once it has been compiled
        if not config.CACHE_DIR:
            raise
        _logger.warning(
            "kernels are compiled at each start: %s cannot be written: %s", config.CACHE_DIR, error.strerror
        )
        config.CACHE_DIR = ""
        return _compile(signature, function)


@cache
def _openmp() -> ctypes.CDLL:
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    if not found:
        raise OSError("torch brings no libgomp")
    openmp = ctypes.CDLL(str(found[0]))
    openmp.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    openmp.GOMP_parallel.restype = None
    for name in ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"):
        address = ctypes.cast(getattr(openmp, name), ctypes.c_void_p).value
        llvm.add_symbol(name, address)
    return openmp
