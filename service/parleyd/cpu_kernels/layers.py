"""What stands between a decoder layer's matrix products, each in one pass over its rows."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from parleyd.cpu_kernels.numbers import (
    bfloat16_array,
    float_argument,
    int64_array,
    power_of_two,
    rounded,
    stack_floats,
    widened,
)
from parleyd.cpu_kernels.threads import Kernel, bits_of, num_threads, thread_index

_LOG2_E = np.float32(math.log2(math.e))
# To wake another thread takes as long as so many numbers.
_MIN_NUMBERS = 4096


def add_and_normalise(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """Adds `delta` to `x` in place, and returns its RMS norm. `x`, `delta`: `[rows, hidden]`, `weight`: `[hidden]`."""
    num_rows, width = x.shape
    normalised = torch.empty_like(x)
    _norm_kernel()(
        _num_threads(x), x.data_ptr(), 0 if delta is None else delta.data_ptr(), weight.data_ptr(),
        normalised.data_ptr(), num_rows, width, bits_of(epsilon),
    )  # fmt: skip
    return normalised


def gate(gate_up: Tensor) -> Tensor:
    """SiLU of the left half times the right half. `gate_up`: `[rows, 2 * width]`."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    gated = gate_up.new_empty((num_rows, width))
    _gate_kernel()(_num_threads(gate_up), gate_up.data_ptr(), gated.data_ptr(), num_rows, width)
    return gated


def rotate_and_write(
    qkv: Tensor, num_kv_heads: int, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """See LayerOps; in place."""
    num_rows, num_heads, head_dim = qkv.shape
    _rotate_kernel(head_dim)(
        _num_threads(qkv), *(tensor.data_ptr() for tensor in (qkv, cos, sin, slots, keys, values)),
        num_rows, num_heads, num_kv_heads, keys.numel() // head_dim,
    )  # fmt: skip
    return qkv


def _num_threads(tensor: Tensor) -> int:
    return min(tensor.shape[0], max(1, tensor.numel() // _MIN_NUMBERS))


@cache
def _norm_kernel() -> Kernel:
    def normalise(arguments):
        x_at, delta_at, weight_at, normalised_at, num_rows, width, epsilon_bits = carray(arguments, (7,))
        x, delta = bfloat16_array(x_at, (num_rows, width)), bfloat16_array(delta_at, (num_rows, width))
        weight, normalised = bfloat16_array(weight_at, (width,)), bfloat16_array(normalised_at, (num_rows, width))
        for row in range(thread_index(), num_rows, num_threads()):
            if delta_at:
                for i in range(width):
                    x[row, i] = rounded(widened(x[row, i]) + widened(delta[row, i]))
            squares = np.float32(0)
            for i in range(width):
                squares += widened(x[row, i]) * widened(x[row, i])
            scale = np.float32(1) / np.sqrt(squares / np.float32(width) + float_argument(epsilon_bits))
            for i in range(width):
                normalised[row, i] = rounded(widened(x[row, i]) * scale * widened(weight[i]))

    return Kernel(normalise)


@cache
def _gate_kernel() -> Kernel:
    def apply(arguments):
        gate_up_at, gated_at, num_rows, width = carray(arguments, (4,))
        gate_up, gated = bfloat16_array(gate_up_at, (num_rows, 2 * width)), bfloat16_array(gated_at, (num_rows, width))
        for row in range(thread_index(), num_rows, num_threads()):
            for i in range(width):
                x = widened(gate_up[row, i])
                sigmoid = np.float32(1) / (np.float32(1) + power_of_two(-x * _LOG2_E))
                gated[row, i] = rounded(x * sigmoid * widened(gate_up[row, width + i]))

    return Kernel(apply)


@cache
def _rotate_kernel(head_dim: int) -> Kernel:
    half = head_dim // 2

    def apply(arguments):
        (qkv_at, cos_at, sin_at, slots_at, keys_at, values_at,
         num_rows, num_heads, num_kv_heads, num_slots) = carray(arguments, (10,))  # fmt: skip
        qkv = bfloat16_array(qkv_at, (num_rows, num_heads, head_dim))
        cos, sin = bfloat16_array(cos_at, (num_rows, head_dim)), bfloat16_array(sin_at, (num_rows, head_dim))
        slots = int64_array(slots_at, (num_rows, num_kv_heads))
        keys, values = bfloat16_array(keys_at, (num_slots, head_dim)), bfloat16_array(values_at, (num_slots, head_dim))
        rotated = stack_floats(head_dim)
        num_rotated = num_heads - num_kv_heads
        for row in range(thread_index(), num_rows, num_threads()):
            for head in range(num_rotated):
                for i in range(half):
                    left, right = widened(qkv[row, head, i]), widened(qkv[row, head, half + i])
                    rotated[i] = left * widened(cos[row, i]) + right * widened(sin[row, i])
                    rotated[half + i] = right * widened(cos[row, half + i]) + left * widened(sin[row, half + i])
                for i in range(head_dim):
                    qkv[row, head, i] = rounded(rotated[i])
            for kv_head in range(num_kv_heads):
                slot = slots[row, kv_head]
                for i in range(head_dim):
                    keys[slot, i] = qkv[row, num_rotated - num_kv_heads + kv_head, i]
                    values[slot, i] = qkv[row, num_rotated + kv_head, i]

    return Kernel(apply)
