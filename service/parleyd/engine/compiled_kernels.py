"""The kernels of `parleyd.cpu_kernels`, where they can be had. Imports numba: some tenths of a second."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from parleyd.engine.layer_ops import LayerOps
from parleyd.engine.paged_attention import DecodeKernel
from parleyd.model.cache import cache_key

_logger = logging.getLogger("parleyd.engine")


class CompiledKernels(NamedTuple):
    """For bfloat16 on a CPU."""

    decode: DecodeKernel
    layers: LayerOps


def compiled_kernels(cache: Path) -> CompiledKernels | None:
    """None, and a line in the log, where they cannot be compiled. What is compiled is kept in a folder of `cache`."""
    try:
        import numba

        from parleyd import cpu_kernels
        from parleyd.cpu_kernels import decode, layers, threads
    except ImportError as error:
        _logger.warning("no compiled kernels: %s", error)
        return None
    sources = sorted(Path(cpu_kernels.__file__).parent.glob("*.py"))
    threads.keep_compiled(cache / f"kernels-{cache_key(numba.__version__, *sources)}")
    return CompiledKernels(decode.paged_decode, layers)
