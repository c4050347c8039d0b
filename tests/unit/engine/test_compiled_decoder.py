"""All layers in one compiled kernel: bit for bit what they make of the same rows kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from transformers import PreTrainedModel

from parleyd.config import ModelSettings
from parleyd.cpu_kernels import decoder, layers, products
from parleyd.cpu_kernels.decode import paged_decode
from parleyd.engine.lean_forward import LeanForward
from parleyd.kernels.cache import PagedKVCache
from parleyd.kernels.choice import probe_batch
from parleyd.kernels.compiled import CompiledKernels
from parleyd.kernels.layout import StepLayout
from parleyd.kernels.paged import Kernels
from parleyd.model.gguf_blocks import GgufBlocks
from parleyd.model.lean_model import LeanModel
from parleyd.model.linear import maker
from parleyd.model.linear.by_rows import ByRows
from parleyd.model.loader import load_model
from tests.support.tiny_gguf import write_gguf
from tests.support.tiny_models import make_model

COMPILED = CompiledKernels(paged_decode, layers)
BLOCK_SIZE = 16
# Two sequences that decode, and two prompts, one of which goes on.
# Of many rows each layer is a call of its own, which needs no more than the threshold below.
FEW_ROWS = [(5, 1), (37, 1), (0, 4), (19, 3)]
MANY_ROWS = [(5, 1), (37, 1), (0, 56), (19, 20)]

pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.skipif(
        not (products.can_multiply_blocks(32, 32) and products.can_multiply_bfloat16(32, 32)),
        reason="this processor has no such instructions",
    ),
]


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "_MANY_ROWS", 64)


def make_forward(model: PreTrainedModel, blocks: GgufBlocks | None = None) -> tuple[LeanForward, PagedKVCache]:
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    shape = (config.num_hidden_layers, 16, BLOCK_SIZE, config.num_key_value_heads, head_dim)
    cache = PagedKVCache(shape, torch.bfloat16, "cpu", Kernels(paged_decode, takes_prompts=True))
    return LeanForward(LeanModel.of(model), cache, blocks=blocks, compiled=COMPILED), cache


@torch.inference_mode()
def run(forward: LeanForward, cache: PagedKVCache, stretches: list[tuple[int, int]]) -> list[Tensor]:
    """The logits of all rows, and what the step leaves in the cache."""
    torch.manual_seed(0)
    for tensor in (cache.keys, cache.values):
        tensor.copy_(torch.randn(tensor.shape))
    batch = probe_batch(stretches, BLOCK_SIZE, num_decodes=2)
    layout = StepLayout.of(batch, cache)
    assert layout.paged_decode is not None
    rows, positions = torch.arange(batch.num_tokens), torch.frombuffer(batch.positions(), dtype=torch.int64)
    return [forward(rows + 5, positions, layout, rows), cache.keys.clone(), cache.values.clone()]


def assert_same_kernel_by_kernel(forward: LeanForward, cache: PagedKVCache) -> None:
    assert forward._decoder is not None
    in_one = [run(forward, cache, stretches) for stretches in (FEW_ROWS, MANY_ROWS)]
    forward._decoder = None
    for ours, stretches in zip(in_one, (FEW_ROWS, MANY_ROWS), strict=True):
        assert float(ours[0].abs().max()) > 0.1
        assert_same(ours, run(forward, cache, stretches))


def assert_same(these: list[Tensor], those: list[Tensor]) -> None:
    assert all(torch.equal(this, that) for this, that in zip(these, those, strict=True))


def layers_at_calls(forward: LeanForward, cache: PagedKVCache, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each call of the kernel from now on."""
    assert forward._decoder is not None
    seen: list[int] = []
    call: Callable[..., None] = forward._decoder._kernel

    def watched(*arguments: int) -> None:
        seen.append(cache.num_layers_run)
        call(*arguments)

    monkeypatch.setattr(forward._decoder, "_kernel", watched)
    return seen


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mistral"])
def test_in_bfloat16(family: str) -> None:
    assert_same_kernel_by_kernel(*make_forward(make_model(family, torch.bfloat16, hidden_size=64)))


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0], ids=lambda kind: kind.name)
def test_with_a_files_blocks(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", matrices=kind)
    loaded = load_model(ModelSettings(model=str(path), cache=str(tmp_path / "cache"), dtype="bfloat16"))
    assert loaded.blocks is not None
    assert_same_kernel_by_kernel(*make_forward(loaded.model, loaded.blocks))


def test_with_a_files_blocks_for_few_rows_and_bfloat16_for_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", matrices=GGMLQuantizationType.Q4_1)
    loaded = load_model(ModelSettings(model=str(path), cache=str(tmp_path / "cache"), dtype="bfloat16"))
    monkeypatch.setattr(maker, "are_blocks_fastest", lambda: False)
    monkeypatch.setattr(maker, "choose_by_cost", _choose_blocks_for_few_rows)
    assert_same_kernel_by_kernel(*make_forward(loaded.model, loaded.blocks))


def _choose_blocks_for_few_rows(layers: Sequence[ByRows], dtype: torch.dtype) -> dict[tuple[int, int], int]:
    for layer in layers:
        layer.max_narrow_rows = 16
    return {}


def test_a_step_of_many_rows_tells_progress_at_each_layer_and_computes_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward, cache = make_forward(make_model("Llama", torch.bfloat16, hidden_size=64, num_hidden_layers=5))
    seen = layers_at_calls(forward, cache, monkeypatch)
    layer_by_layer = run(forward, cache, MANY_ROWS)
    assert seen == [0, 1, 2, 3, 4] and cache.num_layers_run == 5
    monkeypatch.setattr(decoder, "_MANY_ROWS", 1000)
    assert_same(layer_by_layer, run(forward, cache, MANY_ROWS))
    assert seen[5:] == [5] and cache.num_layers_run == 10


def test_a_step_of_few_rows_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, cache = make_forward(make_model("Llama", torch.bfloat16, hidden_size=64, num_hidden_layers=5))
    seen = layers_at_calls(forward, cache, monkeypatch)
    run(forward, cache, FEW_ROWS)
    assert seen == [0]


def test_layers_that_it_does_not_know_are_run_kernel_by_kernel() -> None:
    with_norms_of_queries, _ = make_forward(make_model("Qwen3", torch.bfloat16, hidden_size=64))
    assert with_norms_of_queries._decoder is None
    partly_compiled, _ = make_forward(make_model("Llama", torch.bfloat16, hidden_size=64, intermediate_size=36))
    assert partly_compiled._decoder is None
