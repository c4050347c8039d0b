"""All layers of a Llama-like decoder in one kernel, for steps whose rows all attend block by block.

Between the parts of a layer the threads wait for each other, which takes a microsecond; by way of Python it would take
ten, and at few rows that is as long as the work itself. At many rows that is nothing, but the layers together may take
so long that one would take them for a hang: so there the kernel is called for each layer, and what is done is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from numba import carray, njit
from torch import Tensor

from parleyd.cpu_kernels.decode import LOG2_E, attend_head, shares
from parleyd.cpu_kernels.numbers import call, int64_array
from parleyd.cpu_kernels.products import Weights, are_prepared, multiply_share, prepare_inputs, scratch
from parleyd.cpu_kernels.rows import add_and_normalise_row, gate_row, rotate_and_write_row
from parleyd.cpu_kernels.threads import Kernel, barrier, bits_of, num_threads, thread_index

# From so many rows on, a layer takes long beside a call of the kernel.
_MANY_ROWS = 128


# A linear layer's weights for steps of so many rows.
WeightsFor = Callable[[int], Weights]


class Layer(NamedTuple):
    """One decoder layer. `keys`, `values`: its part of the KV cache, `[blocks, kv_heads, block_size, head_dim]`."""

    input_norm: Tensor
    post_norm: Tensor
    keys: Tensor
    values: Tensor
    qkv: WeightsFor
    out: WeightsFor
    gate_up: WeightsFor
    down: WeightsFor


class Decoder:
    """Holds what the kernel needs to know of the layers, and tells `count` of as many as a call of it has run."""

    def __init__(self, layers: Sequence[Layer], epsilon: float, count: Callable[[int], None]) -> None:
        self._count = count
        self._layers = list(layers)  # whose memory the tables point to
        self._tables: dict[int, Tensor] = {}  # by numbers of rows
        first = layers[0]
        _, self._num_kv_heads, self._block_size, self._head_dim = first.keys.shape
        self._num_outs, self._num_attended = first.qkv(1).num_outs, first.out(1).num_ins
        self._num_heads = self._num_outs // self._head_dim
        self._group = self._num_heads // self._num_kv_heads - 2
        self._width = first.down(1).num_ins
        self._scale, self._epsilon = bits_of(self._head_dim**-0.5 * LOG2_E), bits_of(epsilon)
        attend = attend_head(self._group, self._head_dim, self._block_size)
        rotate = rotate_and_write_row(self._head_dim)
        functions = add_and_normalise_row(), rotate, attend, gate_row(), prepare_inputs(), multiply_share()
        self._functions = [function.address for function in functions]
        self._kernel = _kernel()

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        """Runs all layers on `x`, bfloat16 `[rows, hidden]`, which changes, and returns what is still to be added.

        `cos`, `sin`, `slots`: see LayerOps; `table`, `lengths`: see DecodeKernel.
        """
        num_rows, hidden = x.shape
        inputs = x.new_empty((num_rows, max(hidden, self._num_attended, self._width)))
        outputs = x.new_empty((num_rows, max(self._num_outs, 2 * self._width)))
        codes, scales = scratch(*inputs.shape)
        num_tokens = table.shape[1] * self._block_size
        num_items, num_together, num_weights = shares(
            num_rows, self._num_kv_heads, self._group, self._head_dim, self._block_size, num_tokens
        )
        weights = torch.empty((torch.get_num_threads(), num_weights))
        delta = torch.empty_like(x)
        layers = self._table(min(num_rows, _MANY_ROWS))  # of more, all take the same weights
        tensors = (x, delta, inputs, outputs, codes, scales, weights, layers, cos, sin, slots, table, lengths)
        addresses = [tensor.data_ptr() for tensor in tensors]
        num_layers = len(self._layers)
        num_at_once = 1 if num_rows >= _MANY_ROWS else num_layers
        for start in range(0, num_layers, num_at_once):
            self._kernel(
                len(weights), *self._functions, *addresses, start, start + num_at_once, num_items, num_together,
                num_rows, hidden, self._num_heads, self._num_kv_heads, self._head_dim, self._width, table.stride(0),
                weights.stride(0), self._scale, self._epsilon,
            )  # fmt: skip
            self._count(num_at_once)
        return delta

    def _table(self, num_rows: int) -> Tensor:
        if num_rows not in self._tables:
            self._tables[num_rows] = torch.tensor([_addresses(layer, num_rows) for layer in self._layers])
        return self._tables[num_rows]


def _addresses(layer: Layer, num_rows: int) -> list[int]:
    """A row of the table."""
    numbers = [tensor.data_ptr() for tensor in (layer.input_norm, layer.post_norm, layer.keys, layer.values)]
    for weights_for in (layer.qkv, layer.out, layer.gate_up, layer.down):
        numbers += weights_for(num_rows).arguments()
    return numbers


# Where a matrix stands in a row of the table.
_QKV, _OUT, _GATE_UP, _DOWN = 4, 7, 10, 13
_ROW = 16


@cache
def _kernel() -> Kernel:
    def run(arguments):
        (normalise, rotate, attend, gate, prepare, multiply,
         x, delta, inputs, outputs, codes, scales, weights, layers, cos, sin, slots, table, lengths,
         start, end, num_items, num_together, num_rows, hidden, num_heads, num_kv_heads, head_dim, width, table_width,
         num_weights, scale, epsilon) = carray(arguments, (33,))  # fmt: skip
        thread, num = thread_index(), num_threads()
        own_weights = weights + 4 * thread * num_weights
        num_attended, num_outs = (num_heads - 2 * num_kv_heads) * head_dim, num_heads * head_dim
        functions, step = (prepare, multiply), (inputs, codes, scales, num_rows)
        for index in range(start, end):
            layer = int64_array(layers + 8 * index * _ROW, (_ROW,))
            input_norm, post_norm, keys, values = layer[0], layer[1], layer[2], layer[3]
            for row in range(thread, num_rows, num):
                call(normalise, row, x, delta if index else 0, input_norm, inputs, hidden, epsilon)
            _multiply(functions, layer[_QKV : _QKV + 3], step, outputs, num_outs, hidden)
            for row in range(thread, num_rows, num):
                call(rotate, row, outputs, cos, sin, slots, keys, values, num_heads, num_kv_heads)
            barrier()
            for item in range(thread, num_items, num):
                call(
                    attend, item, num_together, num_rows, outputs, num_outs, keys, values, table, table_width, lengths,
                    inputs, num_kv_heads, scale, own_weights,
                )  # fmt: skip
            _multiply(functions, layer[_OUT : _OUT + 3], step, delta, hidden, num_attended)
            for row in range(thread, num_rows, num):
                call(normalise, row, x, delta, post_norm, inputs, hidden, epsilon)
            _multiply(functions, layer[_GATE_UP : _GATE_UP + 3], step, outputs, 2 * width, hidden)
            for row in range(thread, num_rows, num):
                call(gate, row, outputs, inputs, width)
            _multiply(functions, layer[_DOWN : _DOWN + 3], step, delta, hidden, width)

    return Kernel(run)


@njit
def _multiply(functions, weights, step, product, num_outs, num_ins):
    """When all threads have come, and until all have done their share."""
    prepare, multiply = functions
    inputs, codes, scales, num_rows = step
    packed, bias, num_bits = weights
    thread, num = thread_index(), num_threads()
    barrier()
    if are_prepared(num_bits):
        call(prepare, thread, num, inputs, codes, scales, num_rows * num_ins, num_bits)
        barrier()
    call(multiply, thread, num, inputs, codes, scales, packed, bias, num_bits, product, num_rows, num_outs, num_ins)
    barrier()
