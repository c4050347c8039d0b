"""Linear layers as functions of a tensor: the stock one, and one whose weights are laid out for the CPU beforehand."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]

# The number of rows that oneDNN is told to lay the weights out for; they are then used with any number.
_PACKED_ROWS = 16


def plain_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """`weight`: `[out, in]`, `bias`: `[out]`."""
    return lambda x: F.linear(x, weight, bias)


def packed_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """The same with oneDNN's own weight layout, which saves a reorder at every call: bfloat16 on a CPU only."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_ROWS)

    def apply(x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return result

    return apply


def can_pack(weight: Tensor) -> bool:
    """Whether `packed_linear` is to be had for weights such as this."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def build_linear(weight: Tensor, bias: Tensor | None, *, packed: bool) -> Linear:
    """The packed one where it is wanted and to be had."""
    return packed_linear(weight, bias) if packed and can_pack(weight) else plain_linear(weight, bias)
