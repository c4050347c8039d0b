"""The sampler's rows and batches in tests, and what transformers' processors make of one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from parleyd.generation import SamplingParams
from parleyd.sampling import sampler
from parleyd.sampling.sampler import SampledTokens
from parleyd.sampling.sampling_row import SamplingRow

EOS = 3


@dataclass(frozen=True, kw_only=True)
class Params(SamplingParams):
    max_new_tokens: int = 100


def last_ids(rows: list[SamplingRow]) -> Tensor:
    return torch.tensor([row.token_ids[-1] for row in rows])


def sample_all(logits: Tensor, rows: list[SamplingRow]) -> SampledTokens:
    return sampler.sample(logits, rows, last_ids(rows), [EOS])


def processed(logits: Tensor, params: Params, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """The logits of one row after transformers' processors, in transformers' order; the rest as OpenAI defines it."""
    ids = torch.tensor([[*prompt, *output]])
    processors = LogitsProcessorList()
    if params.logit_bias:
        processors.append(SequenceBiasLogitsProcessor({(id_,): bias for id_, bias in params.logit_bias}))
    processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    stop_ids = [EOS, *params.stop_token_ids]
    processors.append(MinNewTokensLengthLogitsProcessor(len(prompt), params.min_new_tokens, stop_ids))
    x = processors(ids, logits[None].clone())
    counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=len(logits)).float()
    x = x - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(ids, x)[0]
