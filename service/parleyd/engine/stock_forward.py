"""The forward pass of any decoder of transformers: its own modules, our attention through its interface."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from parleyd.kernels.cache import PagedKVCache
from parleyd.kernels.choice import probe_batch
from parleyd.kernels.layout import StepLayout, attend

_logger = logging.getLogger("parleyd.engine")

_ATTENTION = "parley_paged"
# What some layers ask of attention, and ours has not: sinks, caps, biases, blocks that an index chose. The check would
# find it out only where it changes much.
_UNKNOWN_OPTIONS = frozenset({"s_aux", "sinks", "softcap", "position_bias", "indices", "block_indices"})
_CHECK_TOKENS = 24
# Of the largest logit: far above what rounding does, also in bfloat16, and far below what a wrong mask does.
_CHECK_TOLERANCE = 0.05
# In float32 on a CPU, where rounding makes a millionth: far below what anything wrong does.
_EXACT_TOLERANCE = 0.001


class StockForward:
    """See `Forward`."""

    def __init__(self, model: PreTrainedModel, cache: PagedKVCache) -> None:
        self._model = model
        self._cache = cache
        self._layout: StepLayout | None = None
        ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, self._attend)
        model.set_attn_implementation(_ATTENTION)

    def __call__(self, input_ids: Tensor, positions: Tensor, layout: StepLayout, sample_rows: Tensor) -> Tensor:
        """See Forward."""
        self._layout = layout
        output = self._model(
            input_ids=input_ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=sample_rows
        )
        logits: Tensor = output.logits[0]
        return logits

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """What transformers calls. `query`: `[1, heads, rows, head_dim]`; the result has heads after rows."""
        assert self._layout is not None
        if unknown := [name for name in _UNKNOWN_OPTIONS & options.keys() if options[name] is not None]:
            raise NotImplementedError(f"attention with {', '.join(unknown)}")
        if not getattr(module, "is_causal", True):
            raise NotImplementedError("attention to what follows")
        scaling = options.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return attend(self._cache, module.layer_idx, self._layout, query, key, value, scale)[None], None


def checked_stock_forward(model: PreTrainedModel, cache: PagedKVCache) -> StockForward | None:
    """The model's own layers with our attention; None, the model left as it was, where they differ with it."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    sequences = torch.arange(2 * _CHECK_TOKENS, device=model.device).view(2, -1) % vocab_size
    own_attention = model.config._attn_implementation
    with torch.inference_mode():
        expected = torch.stack([model(input_ids=ids[None], use_cache=False).logits[0, -1] for ids in sequences]).float()
        forward = StockForward(model, cache)
        try:
            actual = _logits_in_two_steps(forward, sequences, cache).float()
            agrees = bool((actual - expected).abs().max() <= _tolerance(model) * expected.abs().max())
        except torch.AcceleratorError:
            raise
        except Exception:
            _logger.debug("the model's layers fail with our attention", exc_info=True)
            agrees = False
    if agrees:
        return forward
    model.set_attn_implementation(own_attention)
    del forward._cache  # transformers knows our attention, and so the forward pass, as long as the process lives
    return None


def _tolerance(model: PreTrainedModel) -> float:
    is_exact = model.device.type == "cpu" and model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    return _EXACT_TOLERANCE if is_exact else _CHECK_TOLERANCE


def _logits_in_two_steps(forward: StockForward, sequences: Tensor, cache: PagedKVCache) -> Tensor:
    """Those after each of two sequences, `[2, vocab]`. Layers that never ask for our attention, or that keep something
    of their own, are right about one sequence in one step: not about a neighbour, or about what a step before has seen.
    """
    last, half = _CHECK_TOKENS - 1, _CHECK_TOKENS // 2
    logits = torch.empty(0)
    # In the second step the first one decodes, and the other's prompt goes on. All of each fits into one block.
    for num_decodes, stretches in (0, [(0, last), (0, half)]), (1, [(last, 1), (half, _CHECK_TOKENS - half)]):
        layout = StepLayout.of(probe_batch(stretches, cache.block_size, num_decodes), cache)
        ranges = [torch.arange(start, start + num, device=sequences.device) for start, num in stretches]
        ids = torch.cat([ids[positions] for ids, positions in zip(sequences, ranges, strict=True)])
        positions = torch.cat(ranges)
        sample_rows = torch.tensor([len(ranges[0]) - 1, len(ids) - 1], device=sequences.device)
        logits = forward(ids, positions, layout, sample_rows)
    return logits
