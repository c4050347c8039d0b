"""Runs a batch through the loaded model: tensors in, one forward pass over the paged cache, sampled ids out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from parleyd.engine.attention import PagedKVCache, StepLayout, attend
from parleyd.engine.request import Batch
from parleyd.engine.sampler import Sampler, SamplingRow
from parleyd.generation import TokenLogprob

_ATTENTION = "parley_paged"


class Forward(Protocol):
    """A model's forward pass over the paged cache."""

    def __call__(self, input_ids: Tensor, positions: Tensor, layout: StepLayout, sample_rows: Tensor) -> Tensor:
        """`input_ids`, `positions`: `[rows]`; `sample_rows`: `[samples]`. Returns logits, `[samples, vocab]`."""
        ...


class StockForward:
    """Any decoder of transformers, through its attention interface: its own modules, our attention."""

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
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """What transformers calls. `query`: `[1, heads, rows, head_dim]`; the result has heads after rows."""
        assert self._layout is not None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return attend(self._cache, module.layer_idx, self._layout, query, key, value, scale)[None], None


class ModelRunner:
    """Owns the cache's tensors and the sampler; called once a step by the engine."""

    def __init__(self, forward: Forward, cache: PagedKVCache, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._forward = forward
        self._cache = cache
        self._device = cache.keys.device
        self._sampler = Sampler(vocab_size, eos_token_ids, self._device)

    @torch.inference_mode()
    def run(self, batch: Batch) -> tuple[list[int], dict[int, TokenLogprob]]:
        """One sampled id for each entry that samples, in the batch's order, and by their places the log-probabilities
        of those that ask for them."""
        input_ids = torch.frombuffer(batch.token_ids(), dtype=torch.int32).to(self._device, torch.int64)
        positions = torch.frombuffer(batch.positions(), dtype=torch.int64).to(self._device)
        rows, sample_rows, row = [], [], 0
        for item in batch.scheduled:
            row += item.num_tokens
            if item.samples:
                sequence = item.sequence
                sample_rows.append(row - 1)
                rows.append(
                    SamplingRow(
                        sequence.key,
                        sequence.params,
                        sequence.token_ids,
                        sequence.num_prompt_tokens,
                        sequence.num_output_tokens,
                    )
                )
        layout = StepLayout.of(batch, self._cache)
        last_rows = torch.tensor(sample_rows, dtype=torch.int64, device=self._device)
        logits = self._forward(input_ids, positions, layout, last_rows)
        if not rows:
            return [], {}
        sampled = self._sampler.sample(logits, self._sampler.prepare(rows))
        return sampled.token_ids.tolist(), sampled.logprobs.by_row() if sampled.logprobs else {}
