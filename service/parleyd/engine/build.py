"""Which engine drives a loaded model, and how much memory its KV cache gets."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import PreTrainedModel

from parleyd.config import ModelSettings
from parleyd.engine import lean_forward
from parleyd.engine.batching import BatchingEngine
from parleyd.engine.cuda_graphs import CudaCapture, GraphedForward
from parleyd.engine.generate import GenerateEngine
from parleyd.engine.lean_forward import LeanForward
from parleyd.engine.model_runner import Forward, ModelRunner, StockForward
from parleyd.errors import StartupError
from parleyd.generation import ModelInfo
from parleyd.kernels.cache import PagedKVCache
from parleyd.kernels.choice import AttentionShape, choose_kernels, probe_batch
from parleyd.kernels.compiled import CompiledKernels, compiled_kernels
from parleyd.kernels.layout import StepLayout
from parleyd.model.cache import cache_root
from parleyd.model.gguf_blocks import GgufBlocks
from parleyd.model.memory import free_bytes
from parleyd.sampling.grammar import GrammarCompiler
from parleyd.scheduling.kv_cache import KVLedger
from parleyd.scheduling.prefill_budget import PrefillBudget
from parleyd.scheduling.scheduler import Scheduler

_logger = logging.getLogger("parleyd.engine")

_DEFAULT_MAX_RUNNING = 64
# A step of more rows is long enough to be launched piece by piece.
_MAX_GRAPH_ROWS = 256
# Of what is free once the weights are loaded. Main memory is shared with everything else on the machine.
_CPU_SHARE, _GPU_SHARE = 0.25, 0.85
_BLOCKS_SHARE = 0.25
# Chosen by the longest sequence of a forward pass, and so by whatever else is in the batch.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
_CHECK_TOKENS = 24
# Of the largest logit: far above what rounding does, also in bfloat16, and far below what a wrong mask does.
_CHECK_TOLERANCE = 0.05


def build_engine(
    settings: ModelSettings, model: PreTrainedModel, info: ModelInfo, blocks: GgufBlocks | None = None
) -> tuple[str, BatchingEngine | GenerateEngine]:
    """The engine that the settings ask for, and its name; `generate` where `batching` cannot drive the model.

    `blocks`: what the weights were in a .gguf file.

    Raises StartupError where the KV cache does not hold one full context.
    """
    if settings.engine == "batching":
        if settings.attn_implementation != "auto":
            _logger.warning("--attn-implementation is for engine generate: engine batching has its own attention")
        obstacle = batching_obstacle(model)
        engine = None if obstacle else _build_batching(settings, model, info, blocks)
        if engine is not None:
            return "batching", engine
        obstacle = obstacle or "with our attention it computes something else"
        _logger.warning("engine batching cannot drive this model (%s): engine generate serves it", obstacle)
    return "generate", GenerateEngine(model, info.eos_token_ids, info.max_context_tokens, GrammarCompiler(info))


def batching_obstacle(model: PreTrainedModel) -> str | None:
    """Why engine `batching` cannot drive this model, or None."""
    config: Any = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    obstacles = {
        "an encoder-decoder": model.config.is_encoder_decoder,
        "it keeps a state instead of keys and values": getattr(model, "_is_stateful", False),
        "it takes no attention function of ours": not getattr(model, "_supports_attention_backend", False),
        f"layers of {', '.join(sorted(layer_types))}": bool(layer_types - {"full_attention"}),
        "sliding-window attention": window is not None and window < config.max_position_embeddings,
        "soft-capped attention": getattr(config, "attn_logit_softcapping", None) is not None,
        "rotary embeddings that change with the length": bool(_rope_types(config) & _LENGTH_DEPENDENT_ROPE),
        "it is spread over several devices": len(set(getattr(model, "hf_device_map", {}).values())) > 1,
    }
    return next((obstacle for obstacle, is_there in obstacles.items() if is_there), None)


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary embedding: one for all layers, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    of_layers = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(one.get("rope_type")) for one in (parameters, *of_layers)}


def _build_batching(
    settings: ModelSettings, model: PreTrainedModel, info: ModelInfo, blocks: GgufBlocks | None
) -> BatchingEngine | None:
    """None where the model's own layers do not work with our attention."""
    max_running = min(settings.max_running or _DEFAULT_MAX_RUNNING, settings.max_batch_tokens)
    is_cuda = model.device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(model.device)  # where streams, events and kernels belong
    compiled = _compiled(settings, model)
    cache = _build_cache(settings, model, info.max_context_tokens, max_running, compiled)
    # On a CPU a prompt token costs about as much as a stream's own, on a GPU next to nothing.
    budget = PrefillBudget() if model.device.type == "cpu" else None
    scheduler = Scheduler(
        KVLedger(cache.num_blocks, cache.block_size),
        max_running=max_running,
        max_batch_tokens=settings.max_batch_tokens,
        max_context_tokens=info.max_context_tokens,
        eos_token_ids=info.eos_token_ids,
        mixed_prefill_tokens=budget,
    )
    forward: Forward | None
    if settings.lean_layers and lean_forward.can_run(model):
        forward = LeanForward(
            model,
            cache,
            packed=settings.packed_linear,
            blocks=_wanted_blocks(settings, blocks),
            compiled=compiled,
        )
    else:
        forward = checked_stock_forward(model, cache)
    if forward is None:
        return None
    _logger.info(
        "engine batching: %s, KV cache of %d tokens, up to %d at a time",
        type(forward).__name__,
        cache.num_blocks * cache.block_size,
        max_running,
    )
    if is_cuda and settings.cuda_graphs and cache.kernels.decode is not None:
        forward = _graphed(forward, cache, max_running, info.max_context_tokens)
    runner = ModelRunner(forward, cache, info.vocab_size, info.eos_token_ids)
    return BatchingEngine(
        scheduler,
        runner,
        max_running,
        budget,
        overlap=is_cuda and settings.overlap,
        grammars=GrammarCompiler(info),
    )


def _compiled(settings: ModelSettings, model: PreTrainedModel) -> CompiledKernels | None:
    if not (settings.cpu_kernels and model.device.type == "cpu" and model.dtype == torch.bfloat16):
        return None
    return compiled_kernels(cache_root(settings.cache), _head_dim(model))


def _graphed(forward: Forward, cache: PagedKVCache, max_running: int, max_context_tokens: int) -> Forward:
    """The same with its decode steps as CUDA graphs, where they can be captured."""
    max_rows = min(max_running, _MAX_GRAPH_ROWS)
    before = free_bytes(cache.device)
    try:
        graphed = GraphedForward(
            forward, cache, max_rows=max_rows, max_context_tokens=max_context_tokens, capture=CudaCapture()
        )
    except torch.AcceleratorError:
        raise
    except Exception as error:
        _logger.warning("no CUDA graphs: %s: %s", type(error).__name__, error)
        return forward
    _logger.info("CUDA graphs take %.2f GiB", (before - free_bytes(cache.device)) / 2**30)
    return graphed


def _wanted_blocks(settings: ModelSettings, blocks: GgufBlocks | None) -> GgufBlocks | None:
    if blocks is None or not settings.four_bit_linear:
        return None
    if blocks.num_bytes > free_bytes(torch.device("cpu")) * _BLOCKS_SHARE:
        _logger.warning("too little memory is free to hold the weights in 4 bits beside those in bfloat16")
        return None
    return blocks


def checked_stock_forward(model: PreTrainedModel, cache: PagedKVCache) -> StockForward | None:
    """The model's own layers with our attention; None, the model left as it was, where they differ with it."""
    positions = torch.arange(_CHECK_TOKENS, device=model.device)
    ids = positions % model.get_input_embeddings().weight.shape[0]
    own_attention = model.config._attn_implementation
    with torch.inference_mode():
        expected = model(input_ids=ids[None], use_cache=False).logits[0, -1].float()
        forward = StockForward(model, cache)
        try:
            layout = StepLayout.of(probe_batch([(0, _CHECK_TOKENS)], cache.block_size), cache)
            actual = forward(ids, positions, layout, positions[-1:])[0].float()
            agrees = bool((actual - expected).abs().max() <= _CHECK_TOLERANCE * expected.abs().max())
        except Exception:
            _logger.debug("the model's layers fail with our attention", exc_info=True)
            agrees = False
    if agrees:
        return forward
    model.set_attn_implementation(own_attention)
    return None


def _build_cache(
    settings: ModelSettings,
    model: PreTrainedModel,
    max_context_tokens: int,
    max_running: int,
    compiled: CompiledKernels | None,
) -> PagedKVCache:
    config: Any = model.config.get_text_config()
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = _head_dim(model)
    kernels, block_size = choose_kernels(
        settings.attention,
        AttentionShape(
            num_heads=config.num_attention_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=model.dtype,
            device=model.device,
            max_context_tokens=max_context_tokens,
        ),
        compiled,
    )
    block_bytes = 2 * config.num_hidden_layers * block_size * num_kv_heads * head_dim * model.dtype.itemsize
    blocks_of_context = -(-max_context_tokens // block_size)
    budget = _budget_bytes(settings, model.device)
    num_blocks = min(int(budget // block_bytes), blocks_of_context * max_running)
    if num_blocks < blocks_of_context:
        raise StartupError(
            f"--kv-cache-memory: one full context of {max_context_tokens} tokens takes "
            f"{blocks_of_context * block_bytes / 2**30:.3f} GiB, and the KV cache has {budget / 2**30:.3f} GiB"
        )
    shape = (config.num_hidden_layers, num_blocks, block_size, num_kv_heads, head_dim)
    return PagedKVCache(shape, model.dtype, model.device, kernels)


def _head_dim(model: PreTrainedModel) -> int:
    config: Any = model.config.get_text_config()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _budget_bytes(settings: ModelSettings, device: torch.device) -> float:
    if settings.kv_cache_memory is not None:
        return settings.kv_cache_memory * 2**30
    return free_bytes(device) * (_GPU_SHARE if device.type == "cuda" else _CPU_SHARE)
