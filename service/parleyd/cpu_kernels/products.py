"""Matrix products with weights in bfloat16, or in 4- and 8-bit blocks that share a scale, as in .gguf files.

All read the weights in the order in which they lie. Those in blocks take activations that are rounded to 8 bits, with a
scale for each block of a row, as llama.cpp rounds them (block_q8_1): so a processor multiplies 64 of them at once.
"""

from __future__ import annotations

from functools import cache

import llvmlite.binding as llvm
import numpy as np
import torch
from numba import carray
from torch import Tensor

from parleyd.cpu_kernels.instructions import LANES
from parleyd.cpu_kernels.numbers import bfloat16_array, bits_of_float, float32_array, int8_array, widened
from parleyd.cpu_kernels.threads import Kernel, barrier, num_threads, thread_index
from parleyd.cpu_kernels.tiles import BLOCK_SIZE, UNROLLED_INS, multiply_rows

# Added to a float32 below 2**22, it leaves the nearest whole number in the lowest bits.
_ROUNDING = np.float32(3 << 22)


def can_multiply_blocks(num_outs: int, num_ins: int) -> bool:
    """Whether this processor has the instructions for 4- and 8-bit weights, and this shape fits them."""
    return bool(_features().get("avx512vnni")) and num_outs % LANES == 0 and num_ins % BLOCK_SIZE == 0


def can_multiply_bfloat16(num_outs: int, num_ins: int) -> bool:
    """The same for bfloat16; not where there are better ones (AMX), which only oneDNN uses."""
    has_best = _features().get("avx512bf16") and not _features().get("amx-bf16")
    return bool(has_best) and num_outs % LANES == 0 and num_ins % UNROLLED_INS == 0


def pack_bfloat16(weight: Tensor) -> Tensor:
    """`[out, in]` as `multiply_bfloat16` takes it: `[out / LANES, in / 2, LANES, 2]`."""
    num_outs, num_ins = weight.shape
    return weight.view(num_outs // LANES, LANES, num_ins // 2, 2).transpose(1, 2).contiguous()


def multiply_bfloat16(x: Tensor, packed: Tensor) -> Tensor:
    """`[rows, out]` in bfloat16, of `x`: bfloat16 `[rows, in]`."""
    num_rows, num_ins = x.shape
    x = x.contiguous()
    product = x.new_empty((num_rows, len(packed) * LANES))
    _bfloat16_kernel()(
        len(packed), x.data_ptr(), packed.data_ptr(), product.data_ptr(), num_rows, len(packed), num_ins
    )  # fmt: skip
    return product


def pack_blocks(numbers: Tensor, scales: Tensor, minima: Tensor, num_bits: int) -> Tensor:
    """Weights `number * scale + minimum` as `multiply_blocks` takes them: `[out / LANES, in / BLOCK_SIZE, bytes]`.

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
    return torch.cat([*halves, columns.flatten(2)], -1)


def multiply_blocks(x: Tensor, packed: Tensor, num_bits: int) -> Tensor:
    """`[rows, out]` in bfloat16, of `x`: bfloat16 `[rows, in]`."""
    num_rows, num_ins = x.shape
    num_groups, num_blocks = packed.shape[:2]
    x = x.contiguous()
    codes = torch.empty((num_rows, num_ins), dtype=torch.int8)
    scales = torch.empty((2, num_rows, num_blocks))
    product = x.new_empty((num_rows, num_groups * LANES))
    _blocks_kernel(num_bits)(
        num_groups, *(tensor.data_ptr() for tensor in (x, codes, scales, packed, product)),
        num_rows, num_groups, num_ins, packed.stride(0),
    )  # fmt: skip
    return product


@cache
def _features() -> dict[str, bool]:
    return dict(llvm.get_host_cpu_features())


@cache
def _bfloat16_kernel() -> Kernel:
    def apply(arguments):
        x, packed, product, num_rows, num_groups, num_ins = carray(arguments, (6,))
        begin = num_groups * thread_index() // num_threads()
        end = num_groups * (thread_index() + 1) // num_threads()
        row_bytes = 2 * LANES * num_groups
        for group in range(begin, end):
            weights, columns = packed + group * 2 * LANES * num_ins, product + group * 2 * LANES
            multiply_rows(16, weights, x, 0, num_ins, num_rows, columns, row_bytes)

    return Kernel(apply)


@cache
def _blocks_kernel(num_bits: int) -> Kernel:
    def apply(arguments):
        (x_at, codes_at, scales_at, packed, product,
         num_rows, num_groups, num_ins, group_bytes) = carray(arguments, (9,))  # fmt: skip
        num_blocks = num_rows * num_ins // BLOCK_SIZE
        x, codes = bfloat16_array(x_at, (num_blocks, BLOCK_SIZE)), int8_array(codes_at, (num_blocks, BLOCK_SIZE))
        scales = float32_array(scales_at, (2, num_blocks))
        for block in range(thread_index(), num_blocks, num_threads()):
            largest = np.float32(0)
            for i in range(BLOCK_SIZE):
                largest = max(largest, abs(widened(x[block, i])))
            to_code = np.float32(127) / largest if largest > 0 else np.float32(0)
            total = 0
            for i in range(BLOCK_SIZE):
                codes[block, i] = np.int8(bits_of_float(widened(x[block, i]) * to_code + _ROUNDING))
                total += codes[block, i]
            scales[0, block] = largest / np.float32(127)
            scales[1, block] = largest / np.float32(127) * np.float32(total)
        barrier()
        begin = num_groups * thread_index() // num_threads()
        end = num_groups * (thread_index() + 1) // num_threads()
        row_bytes = 2 * LANES * num_groups
        for group in range(begin, end):
            weights, columns = packed + group * group_bytes, product + group * 2 * LANES
            multiply_rows(num_bits, weights, codes_at, scales_at, num_ins, num_rows, columns, row_bytes)

    return Kernel(apply)
