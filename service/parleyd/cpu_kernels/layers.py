"""What stands between a decoder layer's matrix products, each in one pass over its rows."""

from __future__ import annotations

from functools import cache

import torch
from numba import carray
from torch import Tensor

from parleyd.cpu_kernels.numbers import call
from parleyd.cpu_kernels.rows import add_and_normalise_row, gate_row, rotate_and_write_row
from parleyd.cpu_kernels.threads import Kernel, bits_of, num_threads, thread_index

# To wake another thread takes as long as so many numbers.
_MIN_NUMBERS = 4096


def add_and_normalise(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """Adds `delta` to `x` in place, and returns its RMS norm. `x`, `delta`: `[rows, hidden]`, `weight`: `[hidden]`."""
    num_rows, width = x.shape
    normalised = torch.empty_like(x)
    _norm_kernel()(
        _num_threads(x), add_and_normalise_row().address, x.data_ptr(), 0 if delta is None else delta.data_ptr(),
        weight.data_ptr(), normalised.data_ptr(), num_rows, width, bits_of(epsilon),
    )  # fmt: skip
    return normalised


def gate(gate_up: Tensor) -> Tensor:
    """SiLU of the left half times the right half. `gate_up`: `[rows, 2 * width]`."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    gated = gate_up.new_empty((num_rows, width))
    _gate_kernel()(
        _num_threads(gate_up), gate_row().address, gate_up.data_ptr(), gated.data_ptr(), num_rows, width
    )  # fmt: skip
    return gated


def rotate_and_write(
    qkv: Tensor, num_kv_heads: int, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """See LayerOps; in place."""
    num_rows, num_heads, head_dim = qkv.shape
    _rotate_kernel()(
        _num_threads(qkv), rotate_and_write_row(head_dim).address,
        *(tensor.data_ptr() for tensor in (qkv, cos, sin, slots, keys, values)),
        num_rows, num_heads, num_kv_heads,
    )  # fmt: skip
    return qkv


def _num_threads(tensor: Tensor) -> int:
    return min(tensor.shape[0], max(1, tensor.numel() // _MIN_NUMBERS))


@cache
def _norm_kernel() -> Kernel:
    def apply(arguments):
        normalise, x, delta, weight, normalised, num_rows, width, epsilon = carray(arguments, (8,))
        for row in range(thread_index(), num_rows, num_threads()):
            call(normalise, row, x, delta, weight, normalised, width, epsilon)

    return Kernel(apply)


@cache
def _gate_kernel() -> Kernel:
    def apply(arguments):
        gate, gate_up, gated, num_rows, width = carray(arguments, (5,))
        for row in range(thread_index(), num_rows, num_threads()):
            call(gate, row, gate_up, gated, width)

    return Kernel(apply)


@cache
def _rotate_kernel() -> Kernel:
    def apply(arguments):
        rotate, qkv, cos, sin, slots, keys, values, num_rows, num_heads, num_kv_heads = carray(arguments, (10,))
        for row in range(thread_index(), num_rows, num_threads()):
            call(rotate, row, qkv, cos, sin, slots, keys, values, num_heads, num_kv_heads)

    return Kernel(apply)
