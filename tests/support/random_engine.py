"""Engine `batching`, whole but for its model: random logits, so that grammars meet answers no model would give."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from parleyd.engine.batching import BatchingEngine
from parleyd.engine.engine import Engine
from parleyd.engine.model_runner import ModelRunner
from parleyd.generation import EngineRequest, FinishReason, ModelInfo, SamplingParams, TokenLogprob
from parleyd.grammar.state import GrammarCompiler
from parleyd.kernels.cache import PagedKVCache
from parleyd.kernels.layout import StepLayout
from parleyd.scheduling.kv_cache import KVLedger
from parleyd.scheduling.scheduler import Scheduler

BLOCK_SIZE, CONTEXT = 16, 1024
_NUM_NOISES = 97


class RandomForward:
    """Logits that depend on nothing; those of `likely_ids` are higher, for answers to come to an end."""

    def __init__(self, vocab_size: int, likely_ids: Iterable[int], seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._noise = torch.from_numpy(self._random.standard_normal((_NUM_NOISES, vocab_size), np.float32))
        self._likely = torch.zeros(vocab_size)
        self._likely[list(likely_ids)] = 4.0

    def __call__(self, input_ids: Tensor, positions: Tensor, layout: StepLayout, sample_rows: Tensor) -> Tensor:
        """See Forward."""
        rows = self._random.integers(_NUM_NOISES, size=len(sample_rows))
        shifts = self._random.integers(self._noise.shape[1], size=len(sample_rows))
        noise = [self._noise[row].roll(int(shift)) for row, shift in zip(rows, shifts, strict=True)]
        return torch.stack(noise) + self._likely if noise else torch.empty(0)


@dataclass
class Answer:
    """What an engine made of a request."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    grammar_error: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)


def make_random_engine(
    info: ModelInfo, likely_ids: Iterable[int] = (), *, num_blocks: int = 2048, seed: int = 0, overlap: bool = False
) -> BatchingEngine:
    """Its greedy choice is as random as its logits."""
    cache = PagedKVCache((1, num_blocks, BLOCK_SIZE, 1, 8), torch.float32, torch.device("cpu"))
    scheduler = Scheduler(
        KVLedger(num_blocks, BLOCK_SIZE),
        max_running=16,
        max_batch_tokens=512,
        max_context_tokens=info.max_context_tokens,
        eos_token_ids=info.eos_token_ids,
    )
    forward = RandomForward(info.vocab_size, likely_ids, seed)
    runner = ModelRunner(forward, cache, info.eos_token_ids)
    return BatchingEngine(scheduler, runner, 16, GrammarCompiler(info), overlap=overlap)


def info_of(
    folder: str, vocab_size: int, eos_token_ids: tuple[int, ...], max_context_tokens: int = CONTEXT
) -> ModelInfo:
    return ModelInfo(
        tokenizer_dir=folder,
        max_context_tokens=max_context_tokens,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        dtype="float32",
        device="cpu",
        engine="batching",
        max_running=16,
    )


def ask_engine(key: int, grammar: str, output_ids: tuple[int, ...] = (), **params: object) -> EngineRequest:
    sampling = SamplingParams(**{"max_new_tokens": 200, **params}, grammar=grammar)  # type: ignore[arg-type]
    return EngineRequest(key=key, prompt_ids=(1, 2, 3), params=sampling, output_ids=output_ids)


def run_all(engine: Engine, requests: Iterable[EngineRequest]) -> dict[int, Answer]:
    """Every request's answer, by its key."""
    answers: dict[int, Answer] = defaultdict(Answer)
    open_keys = set()
    for request in requests:
        open_keys.add(request.key)
        engine.submit(request)
    while open_keys:
        for output in engine.step():
            assert output.error is None, output.error
            answer = answers[output.key]
            answer.token_ids += output.token_ids
            answer.logprobs += output.logprobs
            if output.is_last:
                answer.finish_reason, answer.grammar_error = output.finish_reason, output.grammar_error
                open_keys.remove(output.key)
    assert engine.stats().num_used_blocks == 0
    return answers
