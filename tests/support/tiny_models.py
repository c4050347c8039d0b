"""Tiny random models of each family, and the batching engine on them without gateway or worker."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

from parleyd.engine.batching import BatchingEngine
from parleyd.engine.cuda_graphs import Capture, GraphedForward
from parleyd.engine.engine import Engine
from parleyd.engine.lean_forward import LeanForward
from parleyd.engine.model_runner import Forward, ModelRunner
from parleyd.engine.stock_forward import StockForward
from parleyd.generation import EngineRequest, ModelInfo, SamplingParams
from parleyd.grammar.state import GrammarCompiler
from parleyd.kernels.cache import PagedKVCache
from parleyd.kernels.paged import NO_KERNELS, Kernels
from parleyd.model.lean_model import LeanModel
from parleyd.scheduling.kv_cache import KVLedger
from parleyd.scheduling.scheduler import Scheduler

VOCAB_SIZE, CONTEXT, EOS, BLOCK_SIZE = 97, 256, 3, 8
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "eos_token_id": EOS,
    "bos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.4,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {"head_dim": 16}, "Mistral": {"sliding_window": None},
    "Gemma": {"head_dim": 16}, "Phi3": {"sliding_window": None},
}  # fmt: skip
LEAN = ("Llama", "Qwen2", "Qwen3", "Mistral")


def make_model(family: str, dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """Random weights, the same at each call. So are biases and those of norms, which a new model has all alike."""
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES.get(family, {}), **config})
    model: PreTrainedModel = getattr(transformers, f"{family}ForCausalLM")(made)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval()


def make_engine(
    model: PreTrainedModel,
    *,
    lean: bool = False,
    num_blocks: int = 256,
    max_batch_tokens: int = 64,
    max_running: int = 16,
    max_mixed_prefill_tokens: int | None = None,
    eos: tuple[int, ...] = (EOS,),
    context: int = CONTEXT,
    kernels: Kernels = NO_KERNELS,
    capture: Capture | None = None,
    overlap: bool = False,
    block_size: int = BLOCK_SIZE,
) -> BatchingEngine:
    """`capture`: replay decode steps so."""
    config: Any = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (config.num_hidden_layers, num_blocks, block_size, config.num_key_value_heads, head_dim)
    cache = PagedKVCache(shape, model.dtype, model.device, kernels)
    scheduler = Scheduler(
        KVLedger(num_blocks, block_size),
        max_running=max_running,
        max_batch_tokens=max_batch_tokens,
        max_context_tokens=context,
        eos_token_ids=eos,
        mixed_prefill_tokens=(lambda *_: max_mixed_prefill_tokens) if max_mixed_prefill_tokens else None,
    )
    forward: Forward = LeanForward(LeanModel.of(model), cache) if lean else StockForward(model, cache)
    if capture is not None:
        forward = GraphedForward(forward, cache, max_rows=max_running, max_context_tokens=context, capture=capture)
    runner = ModelRunner(forward, cache, eos)
    return BatchingEngine(scheduler, runner, max_running, GrammarCompiler(info_of(model, context)), overlap=overlap)


def request(key: int, prompt: tuple[int, ...], **params: Any) -> EngineRequest:
    return EngineRequest(key=key, prompt_ids=prompt, params=SamplingParams(**{"max_new_tokens": 12, **params}))


def run(engine: Engine, *requests: EngineRequest) -> dict[int, list[int]]:
    """Each request's ids; fails if one ends with an error, or leaves blocks behind."""
    for one in requests:
        engine.submit(one)
    ids: dict[int, list[int]] = defaultdict(list)
    open_keys = {one.key for one in requests}
    while open_keys:
        for output in engine.step():
            assert output.error is None, output.error
            ids[output.key] += output.token_ids
            if output.is_last:
                open_keys.remove(output.key)
    assert engine.stats().num_used_blocks == 0
    return ids


def prompts(count: int, seed: int = 0, longest: int = 90) -> list[tuple[int, ...]]:
    chance = random.Random(seed)
    return [tuple(chance.randrange(4, VOCAB_SIZE) for _ in range(chance.randrange(1, longest))) for _ in range(count)]


def oracle(model: PreTrainedModel, prompt: tuple[int, ...], max_new_tokens: int = 12) -> list[int]:
    """`model.generate`'s greedy ids."""
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=EOS, pad_token_id=0, do_sample=False)
    sequences: Any = model.generate(torch.tensor([prompt], device=model.device), generation_config=config)  # type: ignore[operator]
    return list(sequences[0, len(prompt) :].tolist())


def info_of(model: PreTrainedModel, context: int = CONTEXT) -> ModelInfo:
    return ModelInfo(
        tokenizer_dir="", max_context_tokens=context, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,), dtype="float32",
        device="cpu", engine="", max_running=1,
    )  # fmt: skip
