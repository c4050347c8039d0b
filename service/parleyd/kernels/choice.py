"""Which attention kernels a model gets on its device. Each is tried before it is used, and the log tells the outcome.

| | decoding sequences | prompts |
|---|---|---|
| CUDA, torch >= 2.12 | gpu_kernels/triton_decode.py, else gpu_kernels/varlen.py | gpu_kernels/varlen.py |
| CUDA, torch 2.11 | gpu_kernels/triton_decode.py | gathered |
| CPU, bfloat16 | cpu_kernels/decode.py | the same |
| any other | gathered | gathered |
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from parleyd.cpu_kernels.trial import compare
from parleyd.generation import EngineRequest, SamplingParams
from parleyd.gpu_kernels.varlen import varlen_kernels
from parleyd.kernels.cache import PagedKVCache
from parleyd.kernels.compiled import CompiledKernels, first_line
from parleyd.kernels.layout import StepLayout, attend
from parleyd.kernels.paged import BLOCK_SIZE, NO_KERNELS, Kernels
from parleyd.scheduling.request import Batch, Sequence

_logger = logging.getLogger("parleyd.engine")

# FlashAttention 2 reads blocks of multiples of 256 tokens, its successors smaller ones too.
_VARLEN_BLOCK_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True)
class AttentionShape:
    """What a model asks of its attention and of the cache."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    max_context_tokens: int


def choose_kernels(wanted: str, shape: AttentionShape, compiled: CompiledKernels | None = None) -> tuple[Kernels, int]:
    """The kernels and the block size for them. `wanted`: auto, or one kind alone: gather, triton, varlen.

    `compiled`: for a CPU.
    """
    if wanted == "gather" or (wanted == "auto" and shape.device.type != "cuda"):
        decode = compiled.decode if compiled and wanted == "auto" else None
        made = decode and _tried("compiled", lambda: Kernels(decode, takes_prompts=True), BLOCK_SIZE, shape)
        return made or NO_KERNELS, BLOCK_SIZE
    varlen, block_size = NO_KERNELS, BLOCK_SIZE
    for size in () if wanted == "triton" else _VARLEN_BLOCK_SIZES:
        if made := _tried("varlen_attn", lambda: Kernels(*varlen_kernels()), size, shape):
            varlen, block_size = made, size
            break
    # Triton's splits keep a GPU busy with few sequences too, which one split of FlashAttention each does not.
    triton = None if wanted == "varlen" else _tried("Triton", lambda: _triton(shape), block_size, shape)
    decode = triton.decode if triton else None
    _logger.info(
        "attention: decoding by %s, prompts by %s, blocks of %d tokens",
        "triton" if decode else "varlen_attn" if varlen.decode else "gather",
        "varlen_attn" if varlen.prefill else "gather",
        block_size,
    )
    return Kernels(decode or varlen.decode, varlen.prefill), block_size


def check_kernels(kernels: Kernels, block_size: int, shape: AttentionShape) -> None:
    """Raises where they fail on a small batch, or attend to something else than is done without them."""
    # Sequences that decode, also of few tokens, among which one too many or too few weighs; a prompt that goes on,
    # beyond a block, and one that begins.
    starts = (0, 3, 2 * block_size + 5, 8 * block_size + 5)
    decodes = [(min(start, shape.max_context_tokens - 1), 1) for start in starts]
    batch = probe_batch([*decodes, (block_size + 3, 40), (0, 9)], block_size, len(decodes))
    num_blocks = 1 + max(max(item.block_ids) for item in batch.scheduled)
    sizes = (1, num_blocks, block_size, shape.num_kv_heads, shape.head_dim)
    random = torch.Generator(shape.device).manual_seed(0)
    cache = PagedKVCache(sizes, shape.dtype, shape.device)
    cache.keys.normal_(generator=random)
    cache.values.normal_(generator=random)
    query, key, value = (
        cache.keys.new_empty(batch.num_tokens, num_heads, shape.head_dim).normal_(generator=random)
        for num_heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    )

    def attended(used: Kernels) -> Tensor:
        cache.kernels = used
        return attend(cache, 0, StepLayout.of(batch, cache), query, key, value, shape.head_dim**-0.5)

    expected = attended(NO_KERNELS)
    compare(attended(kernels), expected)


def probe_batch(stretches: list[tuple[int, int]], block_size: int, num_decodes: int = 0) -> Batch:
    """A batch that nobody asked for: of each sequence so many tokens from a start, in the first blocks in no order."""
    batch = Batch()
    free = list(range(sum(-(-(start + num_tokens) // block_size) for start, num_tokens in stretches)))
    for key, (start, num_tokens) in enumerate(stretches):
        length = start + num_tokens
        request = EngineRequest(key=key, prompt_ids=(0,) * length, params=SamplingParams(max_new_tokens=1))
        sequence = Sequence(request, key, frozenset(), length + 1)
        sequence.block_ids = array("i", [free.pop(-(index % 2)) for index in range(-(-length // block_size))])
        sequence.num_computed_tokens = start
        batch.add(sequence, num_tokens)
    batch.num_decodes = num_decodes
    return batch


def _triton(shape: AttentionShape) -> Kernels:
    from parleyd.gpu_kernels.triton_decode import triton_decode

    return Kernels(decode=triton_decode(shape.max_context_tokens))


def _tried(name: str, make: Callable[[], Kernels], block_size: int, shape: AttentionShape) -> Kernels | None:
    """What `make` makes; None, and a line in the log, where it cannot be made or fails its trial."""
    try:
        kernels = make()
        check_kernels(kernels, block_size, shape)
    except torch.AcceleratorError:
        raise
    except Exception as error:
        _logger.warning("no %s kernel for attention to blocks of %d tokens: %s", name, block_size, first_line(error))
        return None
    return kernels
