"""All layers in one compiled kernel: bit for bit what they make of the same rows kernel by kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from transformers import PreTrainedModel

from parleyd.config import ModelSettings
from parleyd.cpu_kernels import layers, products
from parleyd.cpu_kernels.decode import paged_decode
from parleyd.cpu_kernels.instructions import has_matrix_unit
from parleyd.engine.lean_forward import LeanForward
from parleyd.kernels.cache import PagedKVCache
from parleyd.kernels.choice import probe_batch
from parleyd.kernels.compiled import CompiledKernels
from parleyd.kernels.layout import StepLayout
from parleyd.kernels.paged import Kernels
from parleyd.model.gguf_blocks import GgufBlocks
from parleyd.model.lean_model import LeanModel
from parleyd.model.loader import load_model
from tests.support.tiny_models import make_model
from tests.unit.model.conftest import write_gguf

COMPILED = CompiledKernels(paged_decode, layers)
BLOCK_SIZE = 8
# Two sequences that decode, and two short prompts, one of which goes on.
STRETCHES = [(5, 1), (17, 1), (0, 4), (9, 3)]

pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.skipif(
        not (products.can_multiply_blocks(32, 32) and products.can_multiply_bfloat16(32, 32)) or has_matrix_unit(),
        reason="this processor has no such instructions, or better ones",
    ),
]


def make_forward(model: PreTrainedModel, blocks: GgufBlocks | None = None) -> tuple[LeanForward, PagedKVCache]:
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    shape = (config.num_hidden_layers, 16, BLOCK_SIZE, config.num_key_value_heads, head_dim)
    cache = PagedKVCache(shape, torch.bfloat16, "cpu", Kernels(paged_decode, max_row_tokens=64))
    return LeanForward(LeanModel.of(model), cache, blocks=blocks, compiled=COMPILED), cache


@torch.inference_mode()
def run(forward: LeanForward, cache: PagedKVCache) -> list[Tensor]:
    """The logits of all rows, and what the step leaves in the cache."""
    torch.manual_seed(0)
    for tensor in (cache.keys, cache.values):
        tensor.copy_(torch.randn(tensor.shape))
    batch = probe_batch(STRETCHES, BLOCK_SIZE, num_decodes=2)
    layout = StepLayout.of(batch, cache)
    assert layout.paged_decode is not None
    rows, positions = torch.arange(batch.num_tokens), torch.frombuffer(batch.positions(), dtype=torch.int64)
    return [forward(rows + 5, positions, layout, rows), cache.keys.clone(), cache.values.clone()]


def assert_same_kernel_by_kernel(forward: LeanForward, cache: PagedKVCache) -> None:
    assert forward._decoder is not None
    in_one = run(forward, cache)
    assert float(in_one[0].abs().max()) > 0.1
    forward._decoder = None
    for ours, kernel_by_kernel in zip(in_one, run(forward, cache), strict=True):
        assert torch.equal(ours, kernel_by_kernel)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mistral"])
def test_in_bfloat16(family: str) -> None:
    model = make_model(family, torch.bfloat16, hidden_size=64)
    with torch.no_grad():  # of a new Qwen2, all biases are 0
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape))
    assert_same_kernel_by_kernel(*make_forward(model))


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0], ids=lambda kind: kind.name)
def test_with_a_files_blocks(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", matrices=kind)
    loaded = load_model(ModelSettings(model=str(path), cache=str(tmp_path / "cache"), dtype="bfloat16"))
    assert loaded.blocks is not None
    assert_same_kernel_by_kernel(*make_forward(loaded.model, loaded.blocks))


def test_layers_that_it_does_not_know_are_run_kernel_by_kernel() -> None:
    with_norms_of_queries, _ = make_forward(make_model("Qwen3", torch.bfloat16, hidden_size=64))
    assert with_norms_of_queries._decoder is None
