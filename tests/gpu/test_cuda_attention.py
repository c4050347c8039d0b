"""Attention kernels on a CUDA device: tried as the service tries them at start, and against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parleyd.kernels.choice import AttentionShape, check_kernels, choose_kernels
from parleyd.kernels.paged import Kernels
from tests.support import torch_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
# (query heads, KV heads, head dimension): SmolLM2, Qwen2.5-7B, Llama 3, Phi-2's odd one.
SHAPES = [(9, 3, 64), (28, 4, 128), (32, 8, 128), (32, 32, 80)]


def shape(heads: tuple[int, int, int], dtype: torch.dtype, max_context_tokens: int = 8192) -> AttentionShape:
    return AttentionShape(
        num_layers=1, num_heads=heads[0], num_kv_heads=heads[1], head_dim=heads[2], dtype=dtype,
        device=torch.device("cuda:0"), max_context_tokens=max_context_tokens,
    )  # fmt: skip


def paged(heads: tuple[int, int, int], dtype: torch.dtype, lengths: list[int], block_size: int) -> tuple[Any, ...]:
    """Query, keys, values, block table, lengths."""
    num_heads, num_kv_heads, head_dim = heads
    blocks_each = -(-max(lengths) // block_size)
    num_blocks = len(lengths) * blocks_each
    random = torch.Generator("cuda").manual_seed(0)
    keys, values = torch.randn(
        2, num_blocks, num_kv_heads, block_size, head_dim, device="cuda", generator=random
    ).to(dtype)  # fmt: skip
    query = torch.randn(len(lengths), num_heads, head_dim, device="cuda", generator=random).to(dtype)
    table = torch.randperm(num_blocks, device="cuda", generator=random).view(len(lengths), -1).int()
    return query, keys, values, table, torch.tensor(lengths, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("block_size", [32, 256])
def test_the_triton_kernel_attends_as_sdpa_does(
    heads: tuple[int, int, int], dtype: torch.dtype, block_size: int
) -> None:
    from parleyd.gpu_kernels.triton_decode import triton_decode

    kernel = triton_decode(8192)
    check_kernels(Kernels(decode=kernel), block_size, shape(heads, dtype))
    arguments = paged(heads, dtype, [1, 31, 32, 33, 255, 256, 257, 4000], block_size)
    expected = torch_kernels.decode(*(one.float() if one.is_floating_point() else one for one in arguments), 0.1)
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(kernel(*arguments, 0.1).float(), expected, rtol=tolerance, atol=tolerance)


def test_the_triton_kernel_gives_a_row_the_same_bits_among_any_neighbours() -> None:
    from parleyd.gpu_kernels.triton_decode import triton_decode

    kernel = triton_decode(8192)
    query, keys, values, table, lengths = paged((28, 4, 128), torch.bfloat16, [3000, 4096, 5, 800], 32)
    together = kernel(query, keys, values, table, lengths, 0.1)
    for row in range(4):
        one = slice(row, row + 1)
        assert torch.equal(kernel(query[one], keys, values, table[one], lengths[one], 0.1), together[one])


@pytest.mark.parametrize("heads", SHAPES)
def test_varlen_attn_over_blocks_where_torch_has_it(
    heads: tuple[int, int, int], caplog: pytest.LogCaptureFixture
) -> None:
    kernels, block_size = choose_kernels("varlen", shape(heads, torch.bfloat16))
    if "unexpected keyword argument" in caplog.text:
        pytest.skip("torch's varlen_attn has no block tables")
    assert kernels.decode and kernels.prefill, caplog.text
    check_kernels(kernels, block_size, shape(heads, torch.bfloat16))


def test_auto_finds_a_kernel_for_decoding(caplog: pytest.LogCaptureFixture) -> None:
    kernels, _ = choose_kernels("auto", shape((28, 4, 128), torch.bfloat16))
    assert kernels.decode, caplog.text
