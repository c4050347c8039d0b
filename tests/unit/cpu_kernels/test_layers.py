"""What the layers do between their products, compiled: against torch's own operators on the same numbers in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parleyd.cpu_kernels import layers
from parleyd.kernels import layer_ops

# Rounding to bfloat16 once.
ROUNDING = 2.0**-8
ROWS = (1, 5, 64)


def assert_rounds_to(actual: Tensor, exact: Tensor) -> None:
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), exact, rtol=ROUNDING, atol=1e-6)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("num_rows", ROWS)
def test_a_norm_of_a_sum(num_rows: int) -> None:
    x, delta, weight = torch.randn(num_rows, 576), torch.randn(num_rows, 576), torch.rand(576).bfloat16()
    summed = x.bfloat16()
    result = layers.add_and_normalise(summed, delta.bfloat16(), weight, 1e-5)
    assert torch.equal(summed, x.bfloat16() + delta.bfloat16())
    assert_rounds_to(result, layer_ops.add_and_normalise(summed.float(), None, weight.float(), 1e-5))


def test_a_norm_alone_leaves_its_input_as_it_is() -> None:
    x, weight = torch.randn(3, 40).bfloat16(), torch.rand(40).bfloat16()
    before = x.clone()
    assert_rounds_to(
        layers.add_and_normalise(x, None, weight, 1e-5),
        layer_ops.add_and_normalise(before.float(), None, weight.float(), 1e-5),
    )
    assert torch.equal(x, before)


@pytest.mark.parametrize("num_rows", ROWS)
def test_a_gate(num_rows: int) -> None:
    gate_up = (10 * torch.randn(num_rows, 2 * 1536)).bfloat16()
    gate_up[0, :4] = torch.tensor([-300.0, 300.0, 0.0, -88.5])
    assert_rounds_to(layers.gate(gate_up), layer_ops.gate(gate_up.float()))


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("num_rows", ROWS)
def test_a_rotation_and_a_writing(num_rows: int, head_dim: int) -> None:
    num_kv_heads, num_blocks, block_size = 3, 9, 8
    qkv = torch.randn(num_rows, 15, head_dim).bfloat16()
    cos, sin = torch.randn(2, num_rows, 1, head_dim).bfloat16()
    slots = torch.randperm(num_blocks * block_size * num_kv_heads)[: num_rows * num_kv_heads]
    caches = torch.randn(2, num_blocks, num_kv_heads, block_size, head_dim).bfloat16()
    exact_caches = caches.float()
    exact = layer_ops.rotate_and_write(qkv.float(), num_kv_heads, cos.float(), sin.float(), slots, *exact_caches)
    result = layers.rotate_and_write(qkv, num_kv_heads, cos, sin, slots, *caches)
    for actual, expected in ((result, exact), (caches, exact_caches)):
        torch.testing.assert_close(actual.float(), expected, rtol=ROUNDING, atol=1e-4)
