"""What kernels make on a small example, held against torch's operators: each is tried before it is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Of the largest number: above what rounding does, and far below what a wrong number or reading a wrong token does.
_TOLERANCE = 0.03


def check_layers(layers: Any, reference: Any, head_dim: int) -> None:
    """Raises where `layers` does something else than `reference`, which has the same functions of torch's operators."""
    random = torch.Generator().manual_seed(0)
    outputs = []
    for ops in (reference, layers):
        random.manual_seed(0)
        x, delta, weight = torch.randn(3, 4, 64, generator=random).bfloat16()
        qkv = torch.randn(4, 5, head_dim, generator=random).bfloat16()
        cos, sin = torch.randn(2, 4, 1, head_dim, generator=random).bfloat16()
        cache = torch.zeros(2, 2, 1, 8, head_dim, dtype=torch.bfloat16)
        normalised, gated = ops.add_and_normalise(x, delta, weight[0].contiguous(), 1e-5), ops.gate(delta)
        rotated = ops.rotate_and_write(qkv, 1, cos, sin, torch.tensor([3, 8, 1, 15]), *cache)
        outputs.append([x, normalised, gated, rotated, cache])
    for expected, actual in zip(*outputs, strict=True):
        compare(actual, expected)


def check_products(products: Any) -> None:
    """Raises where products that this processor can compute are none of the two matrices."""
    random = torch.Generator().manual_seed(0)
    num_outs, num_ins = 48, 96
    x = torch.randn(11, num_ins, generator=random).bfloat16()
    if products.can_multiply_bfloat16(num_outs, num_ins):
        weight = torch.randn(num_outs, num_ins, generator=random).bfloat16()
        compare(products.multiply(x, products.pack_bfloat16(weight)), x.float() @ weight.float().T)
    for num_bits in (4, 8) if products.can_multiply_blocks(num_outs, num_ins) else ():
        numbers = torch.randint(2**num_bits, (num_outs, num_ins), generator=random, dtype=torch.uint8)
        scales, minima = torch.randn(2, num_outs, num_ins // 32, generator=random).half().float()
        weight = numbers.view(num_outs, -1, 32) * scales[..., None] + minima[..., None]
        packed = products.pack_blocks(numbers, scales, minima, num_bits)
        compare(products.multiply(x, packed), x.float() @ weight.flatten(1).T)


def compare(actual: Tensor, expected: Tensor) -> None:
    """Raises RuntimeError where they differ by more than rounding does."""
    error = float((actual.float() - expected.float()).abs().max() / expected.float().abs().max())
    if not error <= _TOLERANCE:  # so that NaN is found too
        raise RuntimeError(f"it computes something else, off by {error:.1%}")
