"""The kernels of `parleyd.cpu_kernels`, where they can be had and pass a trial.

Imports numba only when asked for them: it takes some tenths of a second.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parleyd.kernels import layer_ops
from parleyd.kernels.layer_ops import LayerOps
from parleyd.kernels.paged import DecodeKernel
from parleyd.model.cache import cache_key

_logger = logging.getLogger("parleyd.engine")

# Of the largest number: above what rounding does, and far below what a wrong number or reading a wrong token does.
_TOLERANCE = 0.03


class CompiledKernels(NamedTuple):
    """For bfloat16 on a CPU."""

    decode: DecodeKernel
    layers: LayerOps


def compiled_kernels(cache: Path, head_dim: int) -> CompiledKernels | None:
    """None, and a line in the log, where they cannot be compiled. What is compiled is kept in a folder of `cache`."""
    try:
        import numba

        from parleyd import cpu_kernels
        from parleyd.cpu_kernels import decode, layers, products, threads

        sources = sorted(Path(cpu_kernels.__file__).parent.glob("*.py"))
        threads.keep_compiled(cache / f"kernels-{cache_key(numba.__version__, *sources)}")
        _check_layers(layers, head_dim)
        _check_products(products)
    except Exception as error:
        _logger.warning("no compiled kernels: %s", first_line(error))
        return None
    return CompiledKernels(decode.paged_decode, layers)


def _check_layers(layers: LayerOps, head_dim: int) -> None:
    """Raises where they do something else than torch's operators."""
    random = torch.Generator().manual_seed(0)
    outputs = []
    for ops in (layer_ops, layers):
        random.manual_seed(0)
        x, delta, weight = torch.randn(3, 4, 64, generator=random).bfloat16()
        qkv = torch.randn(4, 5, head_dim, generator=random).bfloat16()
        cos, sin = torch.randn(2, 4, 1, head_dim, generator=random).bfloat16()
        cache = torch.zeros(2, 2, 1, 8, head_dim, dtype=torch.bfloat16)
        normalised, gated = ops.add_and_normalise(x, delta, weight[0].contiguous(), 1e-5), ops.gate(delta)
        rotated = ops.rotate_and_write(qkv, 1, cos, sin, torch.tensor([3, 8, 1, 15]), *cache)
        outputs.append([x, normalised, gated, rotated, cache])
    for expected, actual in zip(*outputs, strict=True):
        compare(actual, expected)


def _check_products(products: Any) -> None:
    """The same for what this processor can."""
    random = torch.Generator().manual_seed(0)
    num_outs, num_ins = 48, 96
    x = torch.randn(11, num_ins, generator=random).bfloat16()
    if products.can_multiply_bfloat16(num_outs, num_ins):
        weight = torch.randn(num_outs, num_ins, generator=random).bfloat16()
        compare(products.multiply(x, products.pack_bfloat16(weight)), x.float() @ weight.float().T)
    for num_bits in (4, 8) if products.can_multiply_blocks(num_outs, num_ins) else ():
        numbers = torch.randint(2**num_bits, (num_outs, num_ins), generator=random, dtype=torch.uint8)
        scales, minima = torch.randn(2, num_outs, num_ins // 32, generator=random).half().float()
        weight = numbers.view(num_outs, -1, 32) * scales[..., None] + minima[..., None]
        packed = products.pack_blocks(numbers, scales, minima, num_bits)
        compare(products.multiply(x, packed), x.float() @ weight.flatten(1).T)


def compare(actual: Tensor, expected: Tensor) -> None:
    """Raises RuntimeError where they differ by more than rounding does."""
    error = float((actual.float() - expected.float()).abs().max() / expected.float().abs().max())
    if not error <= _TOLERANCE:  # so that NaN is found too
        raise RuntimeError(f"it computes something else, off by {error:.1%}")


def first_line(error: Exception) -> str:
    """Of its message, for the log, after what kind of error it is."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
