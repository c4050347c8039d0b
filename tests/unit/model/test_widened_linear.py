"""Linear layers that compute in float32: the same products as torch's in bfloat16, whatever the number of rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from parleyd.model.linear.packed import can_pack
from parleyd.model.linear.widened import can_widen, widened_linear


@pytest.mark.parametrize("num_rows", [1, 4, 5, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_any_number_of_rows_gives_the_exact_products_rounded_once(num_rows: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 64).bfloat16()
    bias = torch.randn(96).bfloat16() if has_bias else None
    x = torch.randn(num_rows, 64).bfloat16()
    result = widened_linear(weight, bias)(x)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), exact, rtol=0.01, atol=0.02)


def test_bfloat16_on_a_cpu_is_either_packed_or_widened() -> None:
    weight = torch.randn(96, 64).bfloat16()
    assert can_pack(weight) != can_widen(weight)
    assert not can_widen(weight.float())
