"""What the lean layers do between their matrix products: with torch, on any device and in any precision."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class LayerOps(Protocol):
    """`parleyd.cpu_kernels.layers` has the same, compiled."""

    def add_and_normalise(self, x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
        """Adds `delta` to `x` in place, and returns its RMS norm. `x`, `delta`: `[rows, hidden]`."""

    def gate(self, gate_up: Tensor) -> Tensor:
        """SiLU of the left half times the right half. `gate_up`: `[rows, 2 * width]`."""

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates each head by its row's position, perhaps in place. `heads`: `[rows, heads, head_dim]`.

        `cos`, `sin`: `[rows, 1, head_dim]`, sines with the sign that their product gets.
        """


class TorchOps:
    """See LayerOps."""

    def add_and_normalise(self, x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
        """See LayerOps."""
        if delta is not None:
            x += delta
        return F.rms_norm(x, weight.shape, weight, epsilon)

    def gate(self, gate_up: Tensor) -> Tensor:
        """See LayerOps."""
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See LayerOps."""
        return (heads * cos).addcmul_(heads.roll(heads.shape[-1] // 2, -1), sin)


TORCH_OPS = TorchOps()
