"""Which engine drives a loaded model, and how much memory its KV cache gets."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from parleyd.config import ModelSettings
from parleyd.engine.batching import BatchingEngine
from parleyd.engine.cuda_graphs import CudaCapture, GraphedForward
from parleyd.engine.lean_forward import LeanForward
from parleyd.engine.model_runner import Forward, ModelRunner
from parleyd.errors import StartupError
from parleyd.generation import ModelInfo
from parleyd.grammar.state import GrammarCompiler
from parleyd.kernels.cache import PagedKVCache
from parleyd.kernels.choice import AttentionShape, choose_kernels
from parleyd.kernels.compiled import CompiledKernels, compiled_kernels
from parleyd.model.cache import cache_root
from parleyd.model.gguf_blocks import GgufBlocks
from parleyd.model.lean_model import LeanModel, can_be_lean
from parleyd.model.memory import free_bytes
from parleyd.scheduling.kv_cache import KVLedger
from parleyd.scheduling.prefill_budget import PrefillBudget
from parleyd.scheduling.scheduler import Scheduler
from parleyd.worker.obstacle import batching_obstacle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from parleyd.engine.generate import GenerateEngine

_logger = logging.getLogger("parleyd.engine")

_DEFAULT_MAX_RUNNING = 64
# A step of more rows is long enough to be launched piece by piece.
_MAX_GRAPH_ROWS = 256
# Of what is free once the weights are loaded. Main memory is shared with everything else on the machine.
_CPU_SHARE, _GPU_SHARE = 0.25, 0.85
_SHARE_FOR_ONE_CONTEXT = 0.5  # if that is what it takes
_BLOCKS_SHARE = 0.25


def build_engine(
    settings: ModelSettings, model: PreTrainedModel | LeanModel, info: ModelInfo, blocks: GgufBlocks | None = None
) -> tuple[str, BatchingEngine | GenerateEngine]:
    """The engine that the settings ask for, and its name; `generate` where `batching` cannot drive the model.

    `blocks`: what the weights were in a .gguf file. A lean model is one for engine `batching`, and so are the settings.

    Raises StartupError where the KV cache does not hold one full context, or would take more than is free.
    """
    if isinstance(model, LeanModel):
        return "batching", _build_lean(settings, model, info, blocks)
    if settings.engine == "batching":
        if settings.attn_implementation != "auto":
            _logger.warning("--attn-implementation is for engine generate: engine batching has its own attention")
        obstacle = batching_obstacle(model)
        if obstacle is None and settings.lean_layers and can_be_lean(model):
            return "batching", _build_lean(settings, LeanModel.of(model), info, blocks)
        engine = None if obstacle else _build_stock(settings, model, info)
        if engine is not None:
            return "batching", engine
        obstacle = obstacle or "with our attention it computes something else"
        _logger.warning("engine batching cannot drive this model (%s): engine generate serves it", obstacle)
    from parleyd.engine.generate import GenerateEngine

    return "generate", GenerateEngine(model, info.eos_token_ids, info.max_context_tokens, GrammarCompiler(info))


def _build_lean(
    settings: ModelSettings, model: LeanModel, info: ModelInfo, blocks: GgufBlocks | None
) -> BatchingEngine:
    own = model.shape
    sizes = (own.num_layers, own.num_heads, own.num_kv_heads, own.head_dim)
    shape = AttentionShape(*sizes, model.dtype, model.device, info.max_context_tokens)
    compiled = _compiled(settings, shape)
    cache = _build_cache(settings, shape, compiled)
    packed, wanted = settings.packed_linear, _wanted_blocks(settings, blocks)
    forward = LeanForward(model, cache, packed=packed, blocks=wanted, compiled=compiled)
    return _build_batching(settings, forward, cache, info)


def _build_stock(settings: ModelSettings, model: PreTrainedModel, info: ModelInfo) -> BatchingEngine | None:
    """None where the model's own layers do not work with our attention."""
    from parleyd.engine.stock_forward import checked_stock_forward

    config: Any = model.config.get_text_config()
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // num_heads)
    sizes = (config.num_hidden_layers, num_heads, num_kv_heads, head_dim)
    shape = AttentionShape(*sizes, model.dtype, model.device, info.max_context_tokens)
    cache = _build_cache(settings, shape, _compiled(settings, shape))
    forward = checked_stock_forward(model, cache)
    return None if forward is None else _build_batching(settings, forward, cache, info)


def _build_batching(settings: ModelSettings, forward: Forward, cache: PagedKVCache, info: ModelInfo) -> BatchingEngine:
    max_running = _max_running(settings)
    is_cuda = cache.device.type == "cuda"
    # On a CPU a prompt token costs about as much as a stream's own, on a GPU next to nothing.
    budget = None if is_cuda else PrefillBudget()
    scheduler = Scheduler(
        KVLedger(cache.num_blocks, cache.block_size),
        max_running=max_running,
        max_batch_tokens=settings.max_batch_tokens,
        max_context_tokens=info.max_context_tokens,
        eos_token_ids=info.eos_token_ids,
        mixed_prefill_tokens=budget,
    )
    _logger.info(
        "engine batching: %s, KV cache of %d tokens, up to %d at a time",
        type(forward).__name__,
        cache.num_blocks * cache.block_size,
        max_running,
    )
    if is_cuda and settings.cuda_graphs and cache.kernels.decode is not None:
        forward = _graphed(forward, cache, max_running, info.max_context_tokens)
    runner = ModelRunner(forward, cache, info.eos_token_ids)
    overlap = is_cuda and settings.overlap
    return BatchingEngine(scheduler, runner, max_running, GrammarCompiler(info), budget, overlap=overlap)


def _max_running(settings: ModelSettings) -> int:
    return min(settings.max_running or _DEFAULT_MAX_RUNNING, settings.max_batch_tokens)


def _compiled(settings: ModelSettings, shape: AttentionShape) -> CompiledKernels | None:
    if shape.device.type == "cpu" and shape.dtype == torch.float16:
        _logger.warning("there are no kernels for float16 on a CPU: --dtype bfloat16 is faster")
    if not (settings.cpu_kernels and shape.device.type == "cpu" and shape.dtype == torch.bfloat16):
        return None
    return compiled_kernels(cache_root(settings.cache), shape.head_dim)


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


def _build_cache(settings: ModelSettings, shape: AttentionShape, compiled: CompiledKernels | None) -> PagedKVCache:
    if shape.device.type == "cuda":
        torch.cuda.set_device(shape.device)  # where streams, events and kernels belong
    kernels, block_size = choose_kernels(settings.attention, shape, compiled)
    block_bytes = 2 * shape.num_layers * block_size * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize
    blocks_of_context = -(-shape.max_context_tokens // block_size)
    free = free_bytes(shape.device)
    share = _GPU_SHARE if shape.device.type == "cuda" else _CPU_SHARE
    default = max(free * share, min(blocks_of_context * block_bytes, free * _SHARE_FOR_ONE_CONTEXT))
    budget = default if settings.kv_cache_memory is None else settings.kv_cache_memory * 2**30
    num_blocks = min(int(budget // block_bytes), blocks_of_context * _max_running(settings))
    if num_blocks < blocks_of_context:
        raise StartupError(
            f"--kv-cache-memory: one full context of {shape.max_context_tokens} tokens takes "
            f"{blocks_of_context * block_bytes / 2**30:.3f} GiB, and the KV cache has {budget / 2**30:.3f} GiB: "
            "--max-context-tokens asks for less, --kv-cache-memory gives more"
        )
    if num_blocks * block_bytes > free:  # main memory would be promised all the same, and run out as requests fill it
        raise StartupError(
            f"--kv-cache-memory: a KV cache of {num_blocks * block_bytes / 2**30:.3f} GiB, and only "
            f"{free / 2**30:.3f} GiB are free"
        )
    sizes = (shape.num_layers, num_blocks, block_size, shape.num_kv_heads, shape.head_dim)
    return PagedKVCache(sizes, shape.dtype, shape.device, kernels)
