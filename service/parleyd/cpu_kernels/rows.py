"""What kernels do to one row of a step. Addresses are those of the first row, and rows follow each other."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numba import njit

from parleyd.cpu_kernels.instructions import LANES
from parleyd.cpu_kernels.numbers import (
    FAST,
    bfloat16_array,
    float_argument,
    int64_array,
    power_of_two,
    rounded,
    stack_floats,
    widened,
)
from parleyd.cpu_kernels.threads import Function

# The most that attend together: of rows of one sequence, those that share a KV head.
MAX_QUERIES = 24

_LOG2_E = np.float32(math.log2(math.e))


@cache
def add_and_normalise_row() -> Function:
    """Adds `delta` to `x`, unless its address is 0, and normalises by the root of the mean square. `[rows, width]`."""

    def apply(row, x_at, delta_at, weight_at, normalised_at, width, epsilon_bits):
        x, delta = bfloat16_array(x_at, (row + 1, width)), bfloat16_array(delta_at, (row + 1, width))
        weight, normalised = bfloat16_array(weight_at, (width,)), bfloat16_array(normalised_at, (row + 1, width))
        if delta_at:
            for i in range(width):
                x[row, i] = rounded(widened(x[row, i]) + widened(delta[row, i]))
        squares = np.float32(0)
        for i in range(width):
            squares += widened(x[row, i]) * widened(x[row, i])
        scale = np.float32(1) / np.sqrt(squares / np.float32(width) + float_argument(epsilon_bits))
        for i in range(width):
            normalised[row, i] = rounded(widened(x[row, i]) * scale * widened(weight[i]))

    return Function(apply)


@cache
def gate_row() -> Function:
    """SiLU of the left half times the right half: from `[rows, 2 * width]` to `[rows, width]`."""

    def apply(row, gate_up_at, gated_at, width):
        gate_up, gated = bfloat16_array(gate_up_at, (row + 1, 2 * width)), bfloat16_array(gated_at, (row + 1, width))
        for i in range(width):
            x = widened(gate_up[row, i])
            sigmoid = np.float32(1) / (np.float32(1) + power_of_two(-x * _LOG2_E))
            gated[row, i] = rounded(x * sigmoid * widened(gate_up[row, width + i]))

    return Function(apply)


@cache
def rotate_and_write_row(head_dim: int) -> Function:
    """See LayerOps. `num_heads`: of queries, keys and values together. `head_dim` is a constant, so that loops over it
    can be unrolled."""
    half = head_dim // 2

    def apply(row, qkv_at, cos_at, sin_at, slots_at, keys_at, values_at, num_heads, num_kv_heads):
        num_rotated = num_heads - num_kv_heads
        qkv = bfloat16_array(qkv_at, (row + 1, num_heads, head_dim))
        cos, sin = bfloat16_array(cos_at, (row + 1, head_dim)), bfloat16_array(sin_at, (row + 1, head_dim))
        slots = int64_array(slots_at, (row + 1, num_kv_heads))
        rotated = stack_floats(head_dim)
        for head in range(num_rotated):
            for i in range(half):
                left, right = widened(qkv[row, head, i]), widened(qkv[row, head, half + i])
                rotated[i] = left * widened(cos[row, i]) + right * widened(sin[row, i])
                rotated[half + i] = right * widened(cos[row, half + i]) + left * widened(sin[row, half + i])
            for i in range(head_dim):
                qkv[row, head, i] = rounded(rotated[i])
        for kv_head in range(num_kv_heads):
            place = slots[row, kv_head] * head_dim * 2
            key, value = bfloat16_array(keys_at + place, (head_dim,)), bfloat16_array(values_at + place, (head_dim,))
            for i in range(head_dim):
                key[i] = qkv[row, num_rotated - num_kv_heads + kv_head, i]
                value[i] = qkv[row, num_rotated + kv_head, i]

    return Function(apply)


@njit(fastmath=FAST, error_model="numpy")
def softmax(scores):
    """In place, of the scores times ln 2."""
    highest = _highest(scores)
    total = np.float32(0)
    for i in range(len(scores)):
        scores[i] = power_of_two(scores[i] - highest)
        total += scores[i]
    inverse = np.float32(1) / total
    for i in range(len(scores)):
        scores[i] *= inverse


@njit
def _highest(scores):
    """In LANES parts side by side, as no compiler dares to: it would not be the same for NaN."""
    highest, num_whole = stack_floats(LANES), len(scores) // LANES * LANES
    for lane in range(LANES):
        highest[lane] = scores[0]
    for start in range(0, num_whole, LANES):
        for lane in range(LANES):
            score = scores[start + lane]
            highest[lane] = score if score > highest[lane] else highest[lane]
    for i in range(num_whole, len(scores)):
        highest[0] = max(highest[0], scores[i])
    for lane in range(1, LANES):
        highest[0] = max(highest[0], highest[lane])
    return highest[0]


@njit
def follows(row, table, lengths, block_size):
    """Whether a row sees what the one before it sees, and one token more in the same block: so it is of the same
    sequence, and where it sees NaN, theirs are the same."""
    length = lengths[row - 1]
    block, num_blocks = 0, (length + block_size - 1) // block_size
    while block < num_blocks and table[row, block] == table[row - 1, block]:
        block += 1
    return block == num_blocks and lengths[row] == length + 1 and length % block_size != 0
