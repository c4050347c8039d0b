"""Linear layers with the compiled products of `parleyd.cpu_kernels`: bfloat16, and a .gguf file's 4- and 8-bit numbers.

Of the file's numbers nothing is rounded again; of their inputs each block is, to 8 bits. Numba is imported only when
one is made: it takes some tenths of a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from parleyd.model.gguf_blocks import Numbers
from parleyd.model.linear.by_rows import ByRows
from parleyd.model.linear.plain import Linear

if TYPE_CHECKING:
    from parleyd.cpu_kernels.products import Weights


# On a matrix unit, from 16 rows on bfloat16 is faster. Beside a program that keeps the memory busy, such as another
# that starts, a measurement may find otherwise.
MAX_BLOCK_ROWS = 12


class CompiledLinear:
    """See `Linear`."""

    def __init__(self, weights: Weights) -> None:
        from parleyd.cpu_kernels.products import multiply

        self.weights = weights
        self._multiply = multiply

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x, self.weights)


def compiled_linear(weight: Tensor, bias: Tensor | None) -> CompiledLinear:
    """As `plain_linear`."""
    from parleyd.cpu_kernels.products import pack_bfloat16

    return CompiledLinear(pack_bfloat16(weight, bias))


def compiled_block_linear(numbers: Numbers, bias: Tensor | None) -> CompiledLinear:
    """`numbers`: of the whole layer."""
    from parleyd.cpu_kernels.products import pack_blocks

    return CompiledLinear(pack_blocks(*numbers.as_whole(), bias))


def compiled_weights(linear: Linear) -> Callable[[int], Weights] | None:
    """A compiled layer's weights for steps of so many rows; None where it is not compiled for all numbers of them."""
    if isinstance(linear, CompiledLinear):
        return lambda num_rows: linear.weights
    if isinstance(linear, ByRows):
        narrow, wide = linear.narrow, linear.wide
        if isinstance(narrow, CompiledLinear) and isinstance(wide, CompiledLinear):
            return lambda num_rows: (narrow if linear.takes_narrow(num_rows) else wide).weights
    return None


def can_compile(weight: Tensor) -> bool:
    """Whether `compiled_linear` is to be had for weights such as this, `[out, in]`."""
    from parleyd.cpu_kernels import products

    return _is_bfloat16(weight) and products.can_multiply_bfloat16(*weight.shape)


def can_compile_blocks(weight: Tensor) -> bool:
    """Whether `compiled_block_linear` may stand in for weights such as this, `[out, in]`."""
    from parleyd.cpu_kernels import products

    return _is_bfloat16(weight) and products.can_multiply_blocks(*weight.shape)


def are_blocks_fastest() -> bool:
    """Whether they are for any number of rows, as measured where there is no matrix unit."""
    from parleyd.cpu_kernels.instructions import has_matrix_unit

    return not has_matrix_unit()


def _is_bfloat16(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16
