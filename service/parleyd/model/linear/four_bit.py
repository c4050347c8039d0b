"""Linear layers on the 4-bit numbers of a .gguf file as they stand: torch's int4 kernel for CPUs, bfloat16 activations.

A kernel's group is a file's block: 32 weights of a row, `(number - 8) * scale + zero` each. What the file says is kept
but for rounding `scale` and `zero` to bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parleyd.model.gguf_blocks import BLOCK_SIZE, Numbers
from parleyd.model.linear.plain import Linear

# The kernel works on this many output features at a time.
_OUT_MULTIPLE = 16


def four_bit_linear(numbers: Numbers, bias: Tensor | None) -> Linear:
    """`numbers`: of the whole layer, see `can_use_four_bits`."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.numbers.int(), 1)
    scales_and_zeros = torch.stack([numbers.scales.T, numbers.zeros.T], -1).bfloat16().contiguous()
    num_planes = numbers.num_planes

    def apply(x: Tensor) -> Tensor:
        x = x.contiguous() if num_planes == 1 else x.repeat(1, num_planes)
        result: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, BLOCK_SIZE, scales_and_zeros)
        return result if bias is None else result + bias

    return apply


def can_use_four_bits(weight: Tensor) -> bool:
    """Whether `four_bit_linear` may stand in for weights such as this, `[out, in]`."""
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.shape[0] % _OUT_MULTIPLE == 0
