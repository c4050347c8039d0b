"""Linear layers with oneDNN's own weight layout, which saves a reorder at every call: bfloat16 on a CPU only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from parleyd.model.linear.plain import Linear

# The number of rows that oneDNN is told to lay the weights out for; they are then used with any number.
_PACKED_ROWS = 16


def packed_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """As `plain_linear`."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_ROWS)

    def apply(x: Tensor) -> Tensor:
        num_rows = len(x)
        x = F.pad(x, (0, 0, 0, _padded(num_rows) - num_rows))
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return result[:num_rows]

    return apply


def _padded(num_rows: int) -> int:
    """At most an eighth more: oneDNN compiles for each number of rows and shape, and keeps half a megabyte of it."""
    step = 1 << max(0, num_rows.bit_length() - 4)
    return -(-num_rows // step) * step


def can_pack(weight: Tensor) -> bool:
    """Whether `packed_linear` is to be had for weights such as this."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
