"""Attention over the paged cache: each way to do it against plain SDPA, sequence by sequence."""

from __future__ import annotations

import importlib
import os
import random
from array import array
from typing import Any

import numpy as np
import pytest
import torch

from parleyd.cpu_kernels.decode import paged_decode
from parleyd.generation import EngineRequest, SamplingParams
from parleyd.kernels import gathered, layer_ops
from parleyd.kernels.cache import PagedKVCache
from parleyd.kernels.choice import AttentionShape, check_kernels, choose_kernels
from parleyd.kernels.compiled import CompiledKernels
from parleyd.kernels.layout import StepLayout, attend
from parleyd.kernels.paged import NO_KERNELS, Kernels
from parleyd.scheduling.request import Batch, BlockCopy, Sequence
from tests.support import torch_kernels
from tests.support.tiny_models import make_engine, make_model, oracle, prompts, request
from tests.support.tiny_models import run as run_engine

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 6, 2, 16, 16, 200


def make_batch(decodes: list[int], chunks: list[tuple[int, int]] = [], block_size: int = BLOCK_SIZE) -> Batch:  # noqa: B006
    """Decodes of so many tokens each, and chunks (start, tokens) of prompts, in blocks of no order."""
    free = list(range(NUM_BLOCKS))
    random.Random(0).shuffle(free)
    batch = Batch()
    for key, (start, num_tokens) in enumerate([(length - 1, 1) for length in decodes] + chunks):
        one = EngineRequest(key=key, prompt_ids=(0,) * (start + num_tokens), params=SamplingParams(max_new_tokens=1))
        sequence = Sequence(one, key, frozenset(), 10_000)
        sequence.block_ids = array("i", [free.pop() for _ in range(-(-(start + num_tokens) // block_size))])
        sequence.num_computed_tokens = start
        batch.add(sequence, num_tokens)
    batch.num_decodes = len(decodes)
    return batch


def run(batch: Batch, kernels: Kernels = NO_KERNELS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The attended rows; what is in the cache, queries and the rest are the same at each call."""
    torch.manual_seed(0)
    cache = PagedKVCache((2, NUM_BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM), dtype, "cpu", kernels)
    cache.keys.normal_()
    cache.values.normal_()
    query, key, value = torch.randn(64, 3, HEADS, HEAD_DIM).to(dtype)[: batch.num_tokens].unbind(1)
    return attend(cache, 1, StepLayout.of(batch, cache), query, key[:, :KV_HEADS], value[:, :KV_HEADS], 0.3)


def test_blocks_are_copied_in_all_layers_with_nothing_behind() -> None:
    cache = PagedKVCache((2, 4, BLOCK_SIZE, KV_HEADS, HEAD_DIM), torch.float32, "cpu")
    cache.keys.normal_()
    cache.values.normal_()
    keys, values = cache.keys.clone(), cache.values.clone()
    cache.copy_blocks([BlockCopy(0, 3, BLOCK_SIZE), BlockCopy(2, 0, 5), BlockCopy(1, 1, 5)])
    for before, after in ((keys, cache.keys), (values, cache.values)):
        expected = before[:, [2, 1, 2, 0, 4]]
        expected[:, :2, :, 5:] = 0
        assert torch.equal(after, expected)


MIXED = make_batch([1, 7, 8, 9, 100, 30, 31], [(0, 5), (13, 4), (0, 1), (40, 24)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathering_attends_as_sdpa_does_alone(dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(
        run(MIXED, dtype=dtype), run(MIXED, torch_kernels.KERNELS, dtype), rtol=tolerance, atol=tolerance
    )


def test_decodes_and_prompts_beyond_what_is_gathered_at_a_time_attend_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(MIXED)
    monkeypatch.setattr(gathered, "_MAX_TOKENS", 60)
    monkeypatch.setattr(gathered, "_MAX_ROWS", 5)
    cache = PagedKVCache((1, 1, BLOCK_SIZE, KV_HEADS, HEAD_DIM), torch.float32, "cpu")
    parts = gathered.Gathered.of_decodes(MIXED.scheduled[: MIXED.num_decodes], cache)
    assert [part.rows for part in parts] == [slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 7)]
    torch.testing.assert_close(run(MIXED), expected)


@pytest.mark.parametrize("takes_prompts", [False, True])
def test_the_compiled_kernel_attends_as_sdpa_does(*, takes_prompts: bool) -> None:
    kernels = Kernels(paged_decode, takes_prompts=takes_prompts)
    torch.testing.assert_close(
        run(MIXED, kernels, torch.bfloat16), run(MIXED, torch_kernels.KERNELS, torch.bfloat16), rtol=0.02, atol=0.02
    )


def test_a_row_does_not_depend_on_its_neighbours_lengths() -> None:
    alone, among = run(make_batch([50])), run(make_batch([50, 150, 1]))
    torch.testing.assert_close(alone, among[:1])


def test_each_token_is_written_to_its_own_slot() -> None:
    cache = PagedKVCache((1, NUM_BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM), torch.float32, "cpu")
    batch = make_batch([20], [(5, 7)])
    rows = torch.arange(1.0, 9.0)[:, None, None].expand(8, KV_HEADS, HEAD_DIM)
    attend(cache, 0, StepLayout.of(batch, cache), rows.repeat(1, 3, 1), rows, -rows, 1.0)
    positions = [(item, p) for item, n in zip(batch.scheduled, (1, 7), strict=True)
                 for p in range(item.start, item.start + n)]  # fmt: skip
    written = np.array([(item.block_ids[p // BLOCK_SIZE], p % BLOCK_SIZE) for item, p in positions])
    assert torch.equal(cache.keys[0, written[:, 0], :, written[:, 1]], rows)
    assert cache.keys.count_nonzero() == rows.numel() == cache.values.count_nonzero()


@pytest.fixture
def triton_decode() -> Any:
    """The module, its kernels interpreted: Triton reads the environment as soon as it is imported (conftest.py)."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("here Triton compiles: see tests/gpu")
    pytest.importorskip("triton", reason="triton is not installed")
    return importlib.import_module("parleyd.gpu_kernels.triton_decode")


def test_the_triton_kernel_attends_as_sdpa_does(triton_decode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Interpreted, bfloat16 is not to be had: NumPy has none.
    monkeypatch.setattr(triton_decode, "_SPLIT_TOKENS", 64)
    lengths = [1, 8, 63, 64, 65, 200]
    kernels = Kernels(decode=triton_decode.triton_decode(300))
    torch.testing.assert_close(run(make_batch(lengths), kernels), run(make_batch(lengths), torch_kernels.KERNELS))


def test_the_triton_kernel_gives_a_row_the_same_bits_among_any_neighbours(triton_decode: Any) -> None:
    kernels = Kernels(decode=triton_decode.triton_decode(1000))
    assert torch.equal(run(make_batch([300]), kernels)[0], run(make_batch([300, 700, 2]), kernels)[0])


def shape(**values: Any) -> AttentionShape:
    return AttentionShape(
        **{"num_layers": 1, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": torch.float32,
           "device": torch.device("cpu"), "max_context_tokens": 500, **values}
    )  # fmt: skip


def test_the_engine_gives_model_generates_ids_with_the_triton_kernel(triton_decode: Any) -> None:
    prompt = prompts(1)[0]
    kernels = Kernels(decode=triton_decode.triton_decode(256))
    engine = make_engine(make_model("Llama"), lean=True, kernels=kernels)
    assert run_engine(engine, request(1, prompt))[1] == oracle(make_model("Llama"), prompt)


def test_a_triton_kernel_that_passes_its_trial_is_chosen(triton_decode: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    kernels, block_size = choose_kernels("triton", shape())
    assert kernels.decode and not kernels.prefill and block_size == 32
    assert "decoding by triton, prompts by gather" in caplog.text


@pytest.mark.parametrize(("wanted", "why"), [("triton", "no Triton kernel"), ("varlen", "no varlen_attn kernel")])
def test_kernels_that_do_not_work_here_are_not_used_and_the_log_says_why(
    wanted: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    kernels, _ = choose_kernels(wanted, shape(dtype=torch.bfloat16))
    assert kernels == NO_KERNELS
    assert why in caplog.text


def test_on_a_cpu_nothing_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_kernels("auto", shape()) == (NO_KERNELS, 32)
    assert not caplog.text


def test_a_device_that_breaks_in_a_trial_is_no_reason_to_go_on_without_the_kernel() -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError):
        choose_kernels("auto", shape(), CompiledKernels(broken, layer_ops))


def test_a_trial_finds_a_kernel_that_reads_one_token_too_many() -> None:
    check_kernels(torch_kernels.KERNELS, 32, shape())

    def wrong(query: Any, keys: Any, values: Any, table: Any, lengths: Any, scale: float) -> torch.Tensor:
        return torch_kernels.decode(query, keys, values, table, lengths - (lengths > 1).int(), scale)

    with pytest.raises(RuntimeError, match="off by"):
        check_kernels(Kernels(decode=wrong), 32, shape())


@pytest.mark.parametrize("max_context_tokens", [3, 128, 8192])
def test_a_trial_asks_for_no_longer_sequence_than_the_kernel_was_made_for(max_context_tokens: int) -> None:
    def limited(query: Any, keys: Any, values: Any, table: Any, lengths: Any, scale: float) -> torch.Tensor:
        assert int(lengths.max()) <= max_context_tokens
        return torch_kernels.decode(query, keys, values, table, lengths, scale)

    check_kernels(Kernels(decode=limited), 32, shape(max_context_tokens=max_context_tokens))
