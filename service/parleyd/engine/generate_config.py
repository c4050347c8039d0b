"""What `model.generate` is told: the model's own generation config, and a request's on top."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessor,
)

from parleyd.generation import SamplingParams
from parleyd.sampling.penalties import MIN_REPETITION_PENALTY
from parleyd.sampling.sampler import MIN_TEMPERATURE


def own_config(config: GenerationConfig) -> GenerationConfig:
    """The model's own configuration less what every request sets, and less the search methods that do not stream
    an id at a time, or need more than the model and the prompt."""
    config = copy.deepcopy(config)
    neutral = GenerationConfig()
    for name in (
        "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "temperature", "top_p", "top_k",
        "min_p", "repetition_penalty", "eos_token_id", "num_beams", "num_return_sequences", "stop_strings", "max_time",
        "forced_eos_token_id",  # would make an answer that is cut off look as if it had ended
        "constraints", "force_words_ids", "penalty_alpha", "dola_layers", "prompt_lookup_num_tokens",
        "assistant_early_exit", "use_mtp", "token_healing", "guidance_scale",
    ):  # fmt: skip
        setattr(config, name, getattr(neutral, name))
    return config


def request_config(
    own: GenerationConfig, params: SamplingParams, max_new_tokens: int, num_output_ids: int, stop_ids: list[int]
) -> GenerationConfig:
    """What a request asks for on top of the model's own (`own_config`), where its first `num_output_ids` of at most
    `max_new_tokens` are made already."""
    config = copy.deepcopy(own)
    config.max_new_tokens = max_new_tokens - num_output_ids
    config.eos_token_id = stop_ids or None
    if num_output_ids:  # the beginning is behind
        config.begin_suppress_tokens = None
    if decay := config.exponential_decay_length_penalty:
        start, factor = decay
        # Without stop ids transformers would look for the end to draw towards.
        config.exponential_decay_length_penalty = (start - num_output_ids, factor) if stop_ids else None
    # As a processor of ours they would come after the repetition penalty.
    config.sequence_bias = _sequence_bias(config.sequence_bias, params)
    config.repetition_penalty = max(params.repetition_penalty, MIN_REPETITION_PENALTY)
    config.do_sample = params.do_sample
    if params.do_sample:
        config.temperature = max(params.temperature, MIN_TEMPERATURE)
        config.top_k = params.top_k
        config.top_p = params.top_p
        config.min_p = params.min_p
    return config


def prompt_processors(own: GenerationConfig, prompt_ids: torch.Tensor) -> list[LogitsProcessor]:
    """What the model's own asks about the prompt: `[1, ids]`. Given to `generate` they take the place of its own,
    which would count the ids to go on after as prompt."""
    processors: list[LogitsProcessor] = []
    if own.encoder_repetition_penalty not in (None, 1.0):
        processors.append(EncoderRepetitionPenaltyLogitsProcessor(own.encoder_repetition_penalty, prompt_ids))
    if own.encoder_no_repeat_ngram_size:
        processors.append(EncoderNoRepeatNGramLogitsProcessor(own.encoder_no_repeat_ngram_size, prompt_ids))
    return processors


def _sequence_bias(own: Any, params: SamplingParams) -> dict[tuple[int, ...], float] | None:
    """The request's biases on top of the model's own, which are of sequences; None where there are none at all.

    Not as lists: transformers 5.17 takes none of them with id 0."""
    pairs = own.items() if isinstance(own, dict) else own or ()
    biases = {tuple(token_ids): float(bias) for token_ids, bias in pairs}
    for token_id, bias in params.logit_bias:
        biases[(token_id,)] = biases.get((token_id,), 0.0) + float(bias)
    return biases or None
