"""The kernels of `parleyd.cpu_kernels`, where they can be had and pass a trial.

Imports numba only when asked for them: it takes some tenths of a second.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from parleyd.kernels import layer_ops
from parleyd.kernels.layer_ops import LayerOps
from parleyd.kernels.paged import DecodeKernel
from parleyd.model.cache import cache_key

_logger = logging.getLogger("parleyd.engine")


class CompiledKernels(NamedTuple):
    """For bfloat16 on a CPU."""

    decode: DecodeKernel
    layers: LayerOps


def compiled_kernels(cache: Path, head_dim: int) -> CompiledKernels | None:
    """None, and a line in the log, where they cannot be compiled. What is compiled is kept in a folder of `cache`."""
    try:
        import numba

        from parleyd import cpu_kernels
        from parleyd.cpu_kernels import decode, layers, products, threads, trial

        sources = sorted(Path(cpu_kernels.__file__).parent.glob("*.py"))
        threads.keep_compiled(cache / f"kernels-{cache_key(numba.__version__, *sources)}")
        trial.check_layers(layers, layer_ops, head_dim)
        trial.check_products(products)
    except Exception as error:
        _logger.warning("no compiled kernels: %s", first_line(error))
        return None
    return CompiledKernels(decode.paged_decode, layers)


def first_line(error: Exception) -> str:
    """Of its message, for the log, after what kind of error it is."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
