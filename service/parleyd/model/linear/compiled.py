"""Linear layers with the compiled products of `parleyd.cpu_kernels`: bfloat16, and a .gguf file's 4- and 8-bit numbers.

Of the file's numbers nothing is rounded again; of their inputs each block is, to 8 bits. Numba is imported only when
one is made: it takes some tenths of a second.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parleyd.model.gguf_blocks import Numbers
from parleyd.model.linear.plain import Linear


def compiled_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """As `plain_linear`."""
    from parleyd.cpu_kernels import products

    packed = products.pack_bfloat16(weight)
    return _with_bias(lambda x: products.multiply_bfloat16(x, packed), bias)


def compiled_block_linear(numbers: Numbers, bias: Tensor | None) -> Linear:
    """`numbers`: of the whole layer."""
    from parleyd.cpu_kernels import products

    codes, scales, minima, num_bits = numbers.as_whole()
    packed = products.pack_blocks(codes, scales, minima, num_bits)
    return _with_bias(lambda x: products.multiply_blocks(x, packed, num_bits), bias)


def can_compile(weight: Tensor) -> bool:
    """Whether `compiled_linear` is to be had for weights such as this, `[out, in]`."""
    from parleyd.cpu_kernels import products

    return _is_bfloat16(weight) and products.can_multiply_bfloat16(*weight.shape)


def can_compile_blocks(weight: Tensor) -> bool:
    """Whether `compiled_block_linear` may stand in for weights such as this, `[out, in]`."""
    from parleyd.cpu_kernels import products

    return _is_bfloat16(weight) and products.can_multiply_blocks(*weight.shape)


def _is_bfloat16(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16


def _with_bias(multiply: Linear, bias: Tensor | None) -> Linear:
    return multiply if bias is None else lambda x: multiply(x).add_(bias)
