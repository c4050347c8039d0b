"""A linear layer as a function of a tensor, and the stock one."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

# From `[rows, in]` to `[rows, out]`.
Linear = Callable[[Tensor], Tensor]


def plain_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """`weight`: `[out, in]`, `bias`: `[out]`."""
    return lambda x: F.linear(x, weight, bias)
