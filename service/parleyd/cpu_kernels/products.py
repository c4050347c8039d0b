"""Matrix products with weights in bfloat16, or in 4- and 8-bit blocks that share a scale, as in .gguf files.

All read the weights in the order in which they lie. Those in blocks take activations that are rounded to 8 bits, with a
scale for each block of a row, as llama.cpp rounds them (block_q8_1): so a processor multiplies 64 of them at once.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from parleyd.cpu_kernels.instructions import LANES, has_bfloat16, has_matrix_unit, has_vectors
from parleyd.cpu_kernels.matrix_tiles import TILE_INS, multiply_tiles
from parleyd.cpu_kernels.numbers import (
    bfloat16_array,
    bits_of_float,
    call,
    float32_array,
    int8_array,
    rounded,
    widened,
)
from parleyd.cpu_kernels.threads import Function, Kernel, barrier, num_threads, thread_index
from parleyd.cpu_kernels.tiles import BLOCK_SIZE, UNROLLED_INS, block_bytes, largest_of_block, multiply_rows

# Of inputs for weights in bfloat16. Where those are widened to multiply them, inputs are too, once for all columns.
_X_BITS = 16 if has_bfloat16() else 32
# Added to a float32 below 2**22, it leaves the nearest whole number in the lowest bits.
_ROUNDING = np.float32(3 << 22)


class Weights(NamedTuple):
    """Of a linear layer, as `multiply` takes them. `num_bits`: 4, 8, or 16 for bfloat16; `bias`: bfloat16 `[out]`."""

    packed: Tensor
    num_bits: int
    num_ins: int
    num_outs: int
    bias: Tensor | None

    def arguments(self) -> tuple[int, int, int]:
        """For kernels: the addresses of the weights and of the bias, and the bits."""
        return self.packed.data_ptr(), 0 if self.bias is None else self.bias.data_ptr(), self.num_bits


def can_multiply_blocks(num_outs: int, num_ins: int) -> bool:
    """Whether this processor has the instructions for 4- and 8-bit weights, and this shape fits them."""
    return has_vectors() and num_outs % LANES == 0 and num_ins % BLOCK_SIZE == 0


def can_multiply_bfloat16(num_outs: int, num_ins: int) -> bool:
    """The same for bfloat16."""
    return has_vectors() and num_outs % LANES == 0 and num_ins % UNROLLED_INS == 0


def pack_bfloat16(weight: Tensor, bias: Tensor | None = None) -> Weights:
    """Of `[out, in]` in bfloat16: `[out / LANES, in / 2, LANES, 2]`."""
    num_outs, num_ins = weight.shape
    packed = weight.view(num_outs // LANES, LANES, num_ins // 2, 2).transpose(1, 2).contiguous()
    return Weights(packed, 16, num_ins, num_outs, bias)


def pack_blocks(numbers: Tensor, scales: Tensor, minima: Tensor, num_bits: int, bias: Tensor | None = None) -> Weights:
    """Of `number * scale + minimum`: `[out / LANES, in / BLOCK_SIZE, bytes]`.

    `numbers`: uint8 `[out, in]`, below `2 ** num_bits` (4 or 8). `scales`, `minima`: `[out, in / BLOCK_SIZE]`, kept as
    float16. For LANES blocks at a time: scales, minima, then numbers, four columns of each row in turn.
    """
    num_outs, num_ins = numbers.shape
    groups = (num_outs // LANES, LANES, num_ins // BLOCK_SIZE)
    columns = numbers.view(*groups, BLOCK_SIZE // 4, 4).permute(0, 2, 3, 1, 4)
    if num_bits == 4:
        low, high = columns.chunk(2, 2)
        columns = low | high << 4
    halves = [part.half().view(groups).transpose(1, 2).contiguous().view(torch.uint8) for part in (scales, minima)]
    return Weights(torch.cat([*halves, columns.flatten(2)], -1), num_bits, num_ins, num_outs, bias)


def multiply(x: Tensor, weights: Weights) -> Tensor:
    """`[rows, out]` in bfloat16, of `x`: bfloat16 `[rows, in]`."""
    num_rows, num_ins = x.shape
    x = x.contiguous()
    product = x.new_empty((num_rows, weights.num_outs))
    codes, scales = scratch(num_rows, num_ins)
    _kernel()(
        weights.num_outs // LANES, prepare_inputs().address, multiply_share().address,
        *(tensor.data_ptr() for tensor in (x, codes, scales)), *weights.arguments(), product.data_ptr(),
        num_rows, weights.num_outs, num_ins,
    )  # fmt: skip
    return product


def scratch(num_rows: int, num_ins: int) -> tuple[Tensor, Tensor]:
    """Room for what `prepare_inputs` makes of so many activations, and for the scales of their blocks."""
    dtype = torch.int8 if _X_BITS == 16 else torch.float32
    return torch.empty((num_rows, num_ins), dtype=dtype), torch.empty((2, num_rows, num_ins // BLOCK_SIZE))


@njit
def are_prepared(num_bits):
    """Whether a product with weights of so many bits takes its inputs from `prepare_inputs`."""
    return num_bits < 16 or _X_BITS == 32


@cache
def prepare_inputs() -> Function:
    """A share of so many inputs of a product, as `tiles.multiply_rows` takes them: float32 for weights of 16 bits, else
    int8, in blocks of BLOCK_SIZE with a scale each."""

    def apply(share, num_shares, x_at, prepared_at, scales_at, num_inputs, num_bits):
        if num_bits == 16:
            numbers, wide = bfloat16_array(x_at, (num_inputs,)), float32_array(prepared_at, (num_inputs,))
            for i in range(num_inputs * share // num_shares, num_inputs * (share + 1) // num_shares):
                wide[i] = widened(numbers[i])
            return
        num_blocks = num_inputs // BLOCK_SIZE
        x, codes = bfloat16_array(x_at, (num_blocks, BLOCK_SIZE)), int8_array(prepared_at, (num_blocks, BLOCK_SIZE))
        scales = float32_array(scales_at, (2, num_blocks))
        for block in range(share, num_blocks, num_shares):
            largest = largest_of_block(x_at + 2 * BLOCK_SIZE * block)
            to_code = np.float32(127) / largest if largest > 0 else np.float32(0)
            total = np.int32(0)
            for i in range(BLOCK_SIZE):
                codes[block, i] = np.int8(bits_of_float(widened(x[block, i]) * to_code + _ROUNDING))
                total = np.int32(total + codes[block, i])
            scales[0, block] = largest / np.float32(127)
            scales[1, block] = largest / np.float32(127) * np.float32(total)

    return Function(apply)


@cache
def multiply_share() -> Function:
    """One of `num_shares` parts of a product's columns. `codes`, `scales`: see `scratch`, and not looked at unless
    `are_prepared`."""
    return Function(_by_tiles if has_matrix_unit() else _by_vectors.py_func)


def _by_tiles(
    share, num_shares, x, codes, scales, packed, bias_at, num_bits, product, num_rows, num_outs, num_ins
):  # fmt: skip
    if num_bits < 16 or num_ins % TILE_INS or num_rows == 0:
        _by_vectors(
            share, num_shares, x, codes, scales, packed, bias_at, num_bits, product, num_rows, num_outs, num_ins
        )  # fmt: skip
        return
    first, end = _groups(share, num_shares, num_outs)
    multiply_tiles(
        end - first, packed + first * 2 * LANES * num_ins, x, num_ins, num_rows,
        product + first * 2 * LANES, 2 * num_outs,
    )  # fmt: skip
    if bias_at:
        _add_bias(bias_at, product, num_rows, num_outs, first, end)


@njit
def _by_vectors(
    share, num_shares, x, codes, scales, packed, bias_at, num_bits, product, num_rows, num_outs, num_ins
):  # fmt: skip
    first, end = _groups(share, num_shares, num_outs)
    group_bytes = 2 * LANES * num_ins if num_bits == 16 else num_ins // BLOCK_SIZE * block_bytes(num_bits)
    num_own, weights, columns = end - first, packed + first * group_bytes, product + first * 2 * LANES
    if num_bits == 4:
        multiply_rows(4, 8, num_own, weights, codes, scales, num_ins, num_rows, columns, 2 * num_outs)
    elif num_bits == 8:
        multiply_rows(8, 8, num_own, weights, codes, scales, num_ins, num_rows, columns, 2 * num_outs)
    else:
        inputs = codes if are_prepared(16) else x
        multiply_rows(16, _X_BITS, num_own, weights, inputs, 0, num_ins, num_rows, columns, 2 * num_outs)
    if bias_at:
        _add_bias(bias_at, product, num_rows, num_outs, first, end)


@njit
def _groups(share, num_shares, num_outs):
    """The first of a share's groups of columns, and the one after its last."""
    num_groups = num_outs // LANES
    return num_groups * share // num_shares, num_groups * (share + 1) // num_shares


@njit
def _add_bias(bias_at, product, num_rows, num_outs, first, end):
    bias = bfloat16_array(bias_at, (num_outs // LANES, LANES))
    products = bfloat16_array(product, (num_rows, num_outs // LANES, LANES))
    for row in range(num_rows):
        for group in range(first, end):
            for lane in range(LANES):
                summed = widened(products[row, group, lane]) + widened(bias[group, lane])
                products[row, group, lane] = rounded(summed)


@cache
def _kernel() -> Kernel:
    def apply(arguments):
        (prepare, multiply, x, codes, scales, packed, bias, num_bits, product,
         num_rows, num_outs, num_ins) = carray(arguments, (12,))  # fmt: skip
        thread, num = thread_index(), num_threads()
        if are_prepared(num_bits):
            call(prepare, thread, num, x, codes, scales, num_rows * num_ins, num_bits)
            barrier()
        call(multiply, thread, num, x, codes, scales, packed, bias, num_bits, product, num_rows, num_outs, num_ins)

    return Kernel(apply)
