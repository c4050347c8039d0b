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
_CHECK_TOKENS = 24
# Of the largest logit: far above what rounding does, also in bfloat16, and far below what a wrong mask does.
_CHECK_TOLERANCE = 0.05


class StockForward:
    """See `Forward`."""

    def __init__(self, model: PreTrainedModel, cache: PagedKVCache) -> None:
        self._model = model
        self._cache = cache
        self._layout: StepLayout | None = None
        self.progress = 0
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
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """What transformers calls. `query`: `[1, heads, rows, head_dim]`; the result has heads after rows."""
        assert self._layout is not None
        self.progress += 1
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return attend(self._cache, module.layer_idx, self._layout, query, key, value, scale)[None], None


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
