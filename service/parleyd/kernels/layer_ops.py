"""What the lean layers do between their matrix products: with torch, on any device and in any precision."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from parleyd.kernels.cache import write


class LayerOps(Protocol):
    """This module is one; `parleyd.cpu_kernels.layers` has the same, compiled."""

    def add_and_normalise(self, x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
        """Adds `delta` to `x` in place, and returns its RMS norm. `x`, `delta`: `[rows, hidden]`."""

    def gate(self, gate_up: Tensor) -> Tensor:
        """SiLU of the left half times the right half. `gate_up`: `[rows, 2 * width]`."""

    def rotate_and_write(
        self, qkv: Tensor, num_kv_heads: int, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Rotates queries and keys by their row's position, perhaps in place, and writes keys and values to `slots`.

        `qkv`: `[rows, heads + 2 * kv_heads, head_dim]`, as is the result. `cos`, `sin`: `[rows, 1, head_dim]`, sines
        with the sign that their product gets. `slots`: see StepLayout; `keys`, `values`: one layer's of the cache.
        """


def add_and_normalise(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """See LayerOps."""
    if delta is not None:
        x += delta
    return F.rms_norm(x, weight.shape, weight, epsilon)


def gate(gate_up: Tensor) -> Tensor:
    """See LayerOps."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def rotate_and_write(
    qkv: Tensor, num_kv_heads: int, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """See LayerOps."""
    query_key = qkv[:, :-num_kv_heads]
    rotated = (query_key * cos).addcmul_(query_key.roll(qkv.shape[-1] // 2, -1), sin)
    qkv = torch.cat([rotated, qkv[:, -num_kv_heads:]], 1)
    write(keys, values, slots, qkv[:, -2 * num_kv_heads : -num_kv_heads], qkv[:, -num_kv_heads:])
    return qkv
