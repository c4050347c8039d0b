"""Linear layers in bfloat16 on a CPU without instructions for it: in float32 where there are more than a few rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from parleyd.model.linear.plain import Linear

# Up to so many, torch's own loop takes no longer than to convert the weights first; at 512 it takes six times as long.
_FEW_ROWS = 4


def widened_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """As `plain_linear`. Weights are converted anew each time: kept, they would take three times the memory."""
    wide_bias = None if bias is None else bias.float()

    def apply(x: Tensor) -> Tensor:
        if len(x) <= _FEW_ROWS:
            return F.linear(x, weight, bias)
        return F.linear(x.float(), weight.float(), wide_bias).to(weight.dtype)

    return apply


def can_widen(weight: Tensor) -> bool:
    """Whether that is faster for weights such as this."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
