"""Runs a batch through the loaded model: tensors in, one forward pass over the paged cache, sampled ids out."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from parleyd.generation import TokenLogprob
from parleyd.grammar.state import GrammarState
from parleyd.kernels.cache import PagedKVCache
from parleyd.kernels.layout import StepLayout
from parleyd.model.upload import upload
from parleyd.sampling.sampler import SampledTokens, sample
from parleyd.sampling.sampling_row import SamplingRow
from parleyd.scheduling.request import Batch, Scheduled

# A model's forward pass over the paged cache: (input ids, positions, layout, sample rows) -> logits. Input ids and
# positions: [rows]; sample rows: [samples]; logits: [samples, vocab].
Forward = Callable[[Tensor, Tensor, StepLayout, Tensor], Tensor]


class Launched(NamedTuple):
    """A step that a device works on, or is still to begin."""

    sampled: SampledTokens  # in the host's memory once `done` has happened
    done: torch.cuda.Event | None  # None: it has run

    def wait(self) -> tuple[list[int | None], dict[int, TokenLogprob]]:
        """One sampled id for each entry that samples, in the batch's order, None where its logits are not finite; and
        by their places the log-probabilities of those that ask for them. Raises what broke the device."""
        if self.done is not None:
            self.done.synchronize()
        token_ids, are_finite, logprobs = self.sampled
        ids = [
            one if is_finite else None for one, is_finite in zip(token_ids.tolist(), are_finite.tolist(), strict=True)
        ]
        return ids, logprobs.by_row() if logprobs else {}


class ModelRunner:
    """Owns the cache's tensors; called once a step by the engine."""

    def __init__(self, forward: Forward, cache: PagedKVCache, eos_token_ids: Collection[int]) -> None:
        self._forward = forward
        self._cache = cache
        self._device = cache.device
        self._eos_token_ids = eos_token_ids
        # What the step before has sampled, on the device: by key, its place in the tensor.
        self._sampled_places: dict[int, int] = {}
        self._sampled_ids = torch.empty(0, dtype=torch.int64, device=self._device)

    @property
    def progress(self) -> int:
        """Rises as a step goes through the layers. Read from another thread."""
        return self._cache.num_layers_run

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launched:
        """Runs a batch after those launched before, whose ids may still be on their way. On CUDA it waits for nothing.

        A batch that could not be launched counts as not there: none that awaits its ids may follow.
        """
        self._cache.copy_blocks(batch.copies + batch.begun_blocks(self._cache.block_size))
        input_ids = self._input_ids(batch)
        positions = upload(np.frombuffer(batch.positions(), np.int64), self._device)
        layout = StepLayout.of(batch, self._cache)
        ends = np.cumsum([item.num_tokens for item in batch.scheduled])
        samples = [item.samples for item in batch.scheduled]
        sampling = [item for item in batch.scheduled if item.samples]
        sample_rows = upload(ends[samples] - 1, self._device)
        logits = self._forward(input_ids, positions, layout, sample_rows)
        rows = [_sampling_row(item) for item in sampling]
        sampled = sample(logits, rows, input_ids.index_select(0, sample_rows), self._eos_token_ids)
        self._sampled_places = {item.sequence.key: place for place, item in enumerate(sampling)}
        self._sampled_ids = sampled.token_ids
        return _launched(sampled, self._device)

    def _input_ids(self, batch: Batch) -> Tensor:
        ids = upload(np.frombuffer(batch.token_ids(), np.int32).astype(np.int64), self._device)
        # Only decodes await an id, and they come first, one row each.
        awaiting = [
            (row, self._sampled_places[item.sequence.key])
            for row, item in enumerate(batch.scheduled[: batch.num_decodes])
            if item.awaits_id
        ]
        if awaiting:
            rows, places = upload(np.array(awaiting, np.int64).T, self._device)
            ids.index_copy_(0, rows, self._sampled_ids.index_select(0, places))
        return ids


def _sampling_row(item: Scheduled) -> SamplingRow:
    sequence = item.sequence
    position = item.start + item.num_tokens - sequence.num_prompt_tokens
    grammar = cast(GrammarState | None, sequence.grammar)
    return SamplingRow(sequence.params, sequence.token_ids, sequence.num_prompt_tokens, position, grammar)


def _launched(sampled: SampledTokens, device: torch.device) -> Launched:
    """With what was sampled on its way to the host."""
    if device.type != "cuda":
        return Launched(sampled, None)
    # Asynchronously, and so into pinned memory.
    on_host = tree_map_only(Tensor, lambda tensor: tensor.to("cpu", non_blocking=True), sampled)
    # Also where nothing samples: else all steps of a long prompt would be launched at once, and whoever comes, or is
    # cancelled, would wait for the last of them.
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()
    return Launched(on_host, done)
