"""Linear layers in oneDNN's layout: the same products as torch's, for few enough numbers of rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from parleyd.model.linear.packed import _padded, can_pack, packed_linear


@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 63, 65, 200])
@pytest.mark.parametrize("has_bias", [False, True])
def test_any_number_of_rows_gives_torchs_products(num_rows: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 64).bfloat16()
    if not can_pack(weight):
        pytest.skip("oneDNN has no bfloat16 on this processor")
    bias = torch.randn(96).bfloat16() if has_bias else None
    x = torch.randn(num_rows, 64).bfloat16()
    result = packed_linear(weight, bias)(x)
    torch.testing.assert_close(result, F.linear(x, weight, bias), rtol=0.02, atol=0.1)


def test_onednn_sees_few_numbers_of_rows() -> None:
    seen = {_padded(num_rows) for num_rows in range(1, 513)}
    assert len(seen) < 60
    assert all(num_rows <= _padded(num_rows) <= num_rows * 1.125 for num_rows in range(1, 513))
    assert [_padded(num_rows) for num_rows in (1, 15, 16, 17, 64, 65, 512)] == [1, 15, 16, 18, 64, 72, 512]
