"""Compiled matrix products: against torch's own in float32 on the same weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from parleyd.cpu_kernels import products

SHAPES = ((16, 32), (48, 96), (160, 576))
NUM_ROWS = (*range(1, 18), 33, 47, 64)
# Rounding the product to bfloat16, of its largest number; and each input to 8 bits, of a block's largest.
ROUNDING = 2.0**-8
STEP = 1 / 127


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def blocks(num_outs: int, num_ins: int, num_bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers, scales and minima, and the weights that they stand for."""
    numbers = torch.randint(2**num_bits, (num_outs, num_ins), dtype=torch.uint8)
    scales, minima = torch.randn(2, num_outs, num_ins // 32).half().float()
    weights = numbers.view(num_outs, -1, 32) * scales[..., None] + minima[..., None]
    return numbers, scales, minima, weights.flatten(1)


def rounded_to_blocks(x: Tensor) -> Tensor:
    """Each block of 32 inputs in 127ths of its largest."""
    grouped = x.float().unflatten(1, (-1, 32))
    steps = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((grouped / steps).round() * steps).flatten(1)


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize(("num_outs", "num_ins"), SHAPES)
def test_bfloat16(num_rows: int, num_outs: int, num_ins: int) -> None:
    if not products.can_multiply_bfloat16(num_outs, num_ins):
        pytest.skip("this processor has no such instructions")
    weight, x = torch.randn(num_outs, num_ins).bfloat16(), torch.randn(num_rows, num_ins).bfloat16()
    exact = x.float() @ weight.float().T
    result = products.multiply(x, products.pack_bfloat16(weight))
    torch.testing.assert_close(result.float(), exact, rtol=ROUNDING, atol=1e-4 * num_ins**0.5)


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize(("num_outs", "num_ins"), SHAPES)
def test_blocks(num_rows: int, num_outs: int, num_ins: int, num_bits: int) -> None:
    if not products.can_multiply_blocks(num_outs, num_ins):
        pytest.skip("this processor has no such instructions")
    numbers, scales, minima, weight = blocks(num_outs, num_ins, num_bits)
    x = torch.randn(num_rows, num_ins).bfloat16()
    result = products.multiply(x, products.pack_blocks(numbers, scales, minima, num_bits)).float()
    expected = rounded_to_blocks(x) @ weight.T
    # An input in the middle between two steps may have gone to the other one.
    one_step = float(weight.abs().max() * x.float().abs().max()) * STEP
    torch.testing.assert_close(result, expected, rtol=ROUNDING, atol=one_step)
    exact = x.float() @ weight.T
    assert (result - exact).norm() <= 2 * STEP * exact.norm()


@pytest.mark.parametrize("num_bits", [4, 8, 16])
@pytest.mark.parametrize("num_rows", [1, 9, 17, 64])
def test_a_bias_is_added_to_the_rounded_product(num_rows: int, num_bits: int) -> None:
    # Of these columns each thread has two pairs of groups, and one group more.
    if not (products.can_multiply_blocks(160, 96) and products.can_multiply_bfloat16(160, 96)):
        pytest.skip("this processor has no such instructions")
    x, bias = torch.randn(num_rows, 96).bfloat16(), torch.randn(160).bfloat16()
    if num_bits == 16:
        weight = torch.randn(160, 96).bfloat16()
        without, with_bias = products.pack_bfloat16(weight), products.pack_bfloat16(weight, bias)
    else:
        parts = blocks(160, 96, num_bits)[:3]
        without, with_bias = products.pack_blocks(*parts, num_bits), products.pack_blocks(*parts, num_bits, bias)
    assert torch.equal(products.multiply(x, with_bias), products.multiply(x, without) + bias)


def test_no_rows_at_all_are_no_error() -> None:
    if not (products.can_multiply_blocks(16, 64) and products.can_multiply_bfloat16(16, 64)):
        pytest.skip("this processor has no such instructions")
    for packed in (
        products.pack_bfloat16(torch.randn(16, 64).bfloat16()), products.pack_blocks(*blocks(16, 64, 4)[:3], 4),
    ):  # fmt: skip
        assert products.multiply(torch.empty(0, 64).bfloat16(), packed).shape == (0, 16)


def test_inputs_of_zero_give_zero() -> None:
    if not products.can_multiply_blocks(16, 64):
        pytest.skip("this processor has no such instructions")
    packed = products.pack_blocks(*blocks(16, 64, 4)[:3], 4)
    assert not products.multiply(torch.zeros(2, 64).bfloat16(), packed).any()


@pytest.mark.parametrize("num_bits", [4, 8, 16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_gives_nothing_that_is(value: float, num_bits: int) -> None:
    if not (products.can_multiply_blocks(160, 96) and products.can_multiply_bfloat16(160, 96)):
        pytest.skip("this processor has no such instructions")
    if num_bits == 16:
        packed = products.pack_bfloat16(torch.randn(160, 96).bfloat16())
    else:
        packed = products.pack_blocks(*blocks(160, 96, num_bits)[:3], num_bits)
    x = torch.randn(3, 96).bfloat16()
    x[1, 37], x[2] = value, value
    are_finite = products.multiply(x, packed).isfinite()
    assert are_finite[0].all() and not are_finite[1:].any()


@pytest.mark.parametrize("num_bits", [4, 8, 16])
def test_a_row_is_the_same_bit_for_bit_whatever_is_beside_it(num_bits: int) -> None:
    if not (products.can_multiply_blocks(160, 576) and products.can_multiply_bfloat16(160, 576)):
        pytest.skip("this processor has no such instructions")
    x = torch.randn(55, 576).bfloat16()
    if num_bits == 16:
        packed = products.pack_bfloat16(torch.randn(160, 576).bfloat16())
    else:
        packed = products.pack_blocks(*blocks(160, 576, num_bits)[:3], num_bits)
    alone = torch.cat([products.multiply(row[None], packed) for row in x])
    for num_rows in (*range(2, 18), 23, 40, 55):
        assert torch.equal(products.multiply(x[:num_rows], packed), alone[:num_rows])


def test_shapes_that_do_not_fit_are_told() -> None:
    assert not products.can_multiply_bfloat16(24, 32) and not products.can_multiply_bfloat16(16, 36)
    assert not products.can_multiply_blocks(24, 32) and not products.can_multiply_blocks(16, 48)
