"""Engine `generate`: `model.generate` in one thread, a request at a time.

It drives whatever architecture transformers can generate with, and is the oracle for faster engines.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

from parleyd.engine.generate_config import own_config, prompt_processors, request_config
from parleyd.errors import StartupError
from parleyd.generation import (
    NOT_FINITE,
    NUM_TOP_LOGPROBS,
    EngineRequest,
    EngineStats,
    FinishReason,
    Output,
    SamplingParams,
    TokenLogprob,
)
from parleyd.grammar.compiler import GrammarError
from parleyd.grammar.state import GrammarCompiler, GrammarState
from parleyd.model.explain import one_line
from parleyd.sampling.grammar_mask import mask_by_grammar

_logger = logging.getLogger("parleyd.engine")


class _Cancelled(Exception):
    """Leaves `generate` for a request that was cancelled."""


@dataclass
class _Sequence:
    """A request in the queue or being generated."""

    request: EngineRequest
    is_cancelled: bool = False
    num_generated: int = 0


class GenerateEngine:
    """See `Engine`. The executor's queue is the request queue, its one thread the generate thread."""

    max_running = 1

    def __init__(
        self,
        model: PreTrainedModel,
        eos_token_ids: tuple[int, ...],
        max_context_tokens: int,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self.progress = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._model = model
        self._eos_token_ids = eos_token_ids
        self._max_context_tokens = max_context_tokens
        self._grammars = grammars
        self._own_config = own_config(model.generation_config)
        self._decoder_start_id = _decoder_start_id(model)
        # LED's decoder has fewer positions than its encoder, which are those of the context.
        self._max_new_tokens = getattr(model.config, "max_decoder_position_embeddings", max_context_tokens)
        # generate() fills what a request leaves unset from here; requests leave unset on purpose.
        model.generation_config = GenerationConfig()
        self._sequences: dict[int, _Sequence] = {}
        self._current: _Sequence | None = None
        self._logits = torch.empty(0)  # [vocab], raw, of the position now being sampled
        model.register_forward_hook(self._keep_logits)
        for layer in _layers(model):
            layer.register_forward_pre_hook(self._before_layer)
        self._outputs: queue.SimpleQueue[Output | Exception] = queue.SimpleQueue()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")

    def submit(self, request: EngineRequest) -> None:
        """See Engine."""
        sequence = self._sequences[request.key] = _Sequence(request, num_generated=len(request.output_ids))
        self._executor.submit(self._generate, sequence)

    def abort(self, key: int) -> None:
        """See Engine."""
        if sequence := self._sequences.get(key):
            sequence.is_cancelled = True

    def step(self) -> list[Output]:
        """See Engine. Raises what broke the device, after which no further step can succeed."""
        outputs = [self._next_output()]
        while not self._outputs.empty():
            outputs.append(self._next_output())
        return outputs

    def stats(self) -> EngineStats:
        """See Engine."""
        num_open = len(self._sequences)
        return EngineStats(
            num_waiting=max(num_open - 1, 0),
            num_running=min(num_open, 1),
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
        )

    def _before_layer(self, *_: object) -> None:
        self.progress += 1
        # The prefill of a long prompt can take minutes: a cancelled one ends before its next layer.
        if self._current is not None and self._current.is_cancelled:
            raise _Cancelled

    def _keep_logits(self, module: object, inputs: object, output: Any) -> None:
        # A logits processor would come too late: penalties come before it.
        self._logits = output.logits[0, -1]

    def _next_output(self) -> Output:
        output = self._outputs.get()
        if isinstance(output, Exception):
            raise output
        return output

    def _generate(self, sequence: _Sequence) -> None:
        """Runs in the generate thread."""
        self._current = sequence
        try:
            if not sequence.is_cancelled:
                self._call_model(sequence)
        except _Cancelled:
            pass
        except torch.AcceleratorError as error:
            self._outputs.put(error)
        except GrammarError as error:
            self._outputs.put(Output(key=sequence.request.key, grammar_error=str(error)))
        except Exception as error:
            _logger.exception("generating for request %d failed", sequence.request.key)
            self._outputs.put(Output(key=sequence.request.key, error=one_line(error)))
        finally:
            del self._sequences[sequence.request.key]
            self.progress += 1  # also for one that was aborted before its first layer

    def _call_model(self, sequence: _Sequence) -> None:
        request, params = sequence.request, sequence.request.params
        self._num_prompt_tokens += len(request.prompt_ids)
        stop_ids = self._stop_ids(params)
        room = self._max_context_tokens - len(request.prompt_ids)
        max_new_tokens = min(params.max_new_tokens, room, self._max_new_tokens)
        grammar = self._start_grammar(request)

        def on_token(token_id: int) -> None:
            if sequence.is_cancelled:
                raise _Cancelled
            self._check_logits()
            sequence.num_generated += 1
            self._num_generated_tokens += 1
            reason = None
            if token_id in stop_ids:
                reason = FinishReason.STOP
            elif sequence.num_generated >= max_new_tokens:
                reason = FinishReason.LENGTH
            elif grammar is not None:
                grammar.advance(token_id)
            if grammar is not None and grammar.error is not None:
                raise GrammarError(grammar.error)
            logprobs = (self._logprob(token_id, params.top_logprobs),) if params.logprobs else ()
            self._outputs.put(Output(key=request.key, token_ids=(token_id,), logprobs=logprobs, finish_reason=reason))

        inputs, num_before = self._inputs(request)
        self._model.generate(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            generation_config=request_config(
                self._own_config, params, max_new_tokens, len(request.output_ids), stop_ids
            ),
            logits_processor=[
                *prompt_processors(self._own_config, inputs["input_ids"][:, : len(request.prompt_ids)]),
                *self._processors(params, num_before, stop_ids, grammar),
            ],
            streamer=_TokenStreamer(on_token),
        )

    def _inputs(self, request: EngineRequest) -> tuple[dict[str, torch.Tensor], int]:
        """What the model reads, and how many ids `generate` has before the first that was generated."""

        def row(*token_ids: int) -> torch.Tensor:
            return torch.tensor([token_ids], dtype=torch.int64, device=self._model.device)

        prompt_ids, output_ids = request.prompt_ids, request.output_ids
        if self._decoder_start_id is None:
            return {"input_ids": row(*prompt_ids, *output_ids)}, len(prompt_ids)
        decoder_ids = row(self._decoder_start_id, *output_ids)
        return {"input_ids": row(*prompt_ids), "decoder_input_ids": decoder_ids}, 1

    def _start_grammar(self, request: EngineRequest) -> GrammarState | None:
        if not request.params.grammar:
            return None
        if self._grammars is None:
            raise ValueError("this engine knows no grammars")
        return self._grammars.start(request).result()

    def _check_logits(self) -> None:
        """Raises ArithmeticError where nothing can be told from them. NaN is taken for the largest, and infinity is."""
        if not bool(self._logits.max().isfinite()):
            raise ArithmeticError(NOT_FINITE)

    def _logprob(self, token_id: int, num_top: int) -> TokenLogprob:
        logprobs = self._logits.float().log_softmax(-1)
        values, ids = logprobs.topk(min(NUM_TOP_LOGPROBS, len(logprobs)))
        return TokenLogprob(float(logprobs[token_id]), TokenLogprob.best(ids.tolist(), values.tolist(), num_top))

    def _stop_ids(self, params: SamplingParams) -> list[int]:
        ignores_eos = params.ignore_eos and not params.grammar  # nothing can follow the end of a grammar
        return [*params.stop_token_ids, *(() if ignores_eos else self._eos_token_ids)]

    def _processors(
        self, params: SamplingParams, num_before: int, stop_ids: list[int], grammar: GrammarState | None
    ) -> list[LogitsProcessor]:
        processors: list[LogitsProcessor] = []
        if params.min_new_tokens:
            masked_ids = [*self._eos_token_ids, *stop_ids]
            # Not through the config: there it would mask only ids that end the answer, and so not EOS under ignore_eos.
            processors.append(
                MinNewTokensLengthLogitsProcessor(
                    num_before, params.min_new_tokens, masked_ids, device=str(self._model.device)
                )
            )
        if params.presence_penalty or params.frequency_penalty:
            processors.append(_CountPenalties(params, num_before))
        if grammar is not None:
            processors.append(_Steered(grammar))
        asked: list[LogitsProcessor] = [_Asked(processors, lambda: self._logits)] if processors else []
        return [*asked, _PositionSeed(params.seed, params.choice, num_before)] if params.do_sample else asked


def _layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers of the decoder, and of the encoder where there is one: the longest list of modules of each."""
    parts: list[Any] = [model]
    if model.config.is_encoder_decoder:
        parts = [model.get_encoder(), model.get_decoder()]
    lists = [[list(one) for one in part.modules() if isinstance(one, torch.nn.ModuleList)] for part in parts]
    return [layer for of_part in lists for layer in max(of_part, key=len, default=[])]


def _decoder_start_id(model: PreTrainedModel) -> int | None:
    """What an encoder-decoder's answers begin with; None for a decoder, whose answers continue the prompt."""
    if not model.config.is_encoder_decoder:
        return None
    config = model.generation_config
    start = config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
    if start is None:
        raise StartupError("the model names no decoder_start_token_id, and no bos_token_id")
    return int(start[0] if isinstance(start, list) else start)  # a list has one for each sequence of a batch


class _TokenStreamer(BaseStreamer):  # type: ignore[misc]
    """Calls `on_token` with each generated id. `generate` puts the prompt first, then the ids one by one."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token = on_token
        self._is_prompt_next = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt_next:
            self._is_prompt_next = False
            return
        self._on_token(int(value))

    def end(self) -> None:
        """Nothing is held back, so nothing is left to send."""


class _Asked(LogitsProcessor):  # type: ignore[misc]
    """What a request asks of logits. Where that and what the model's own configuration asks leave nothing to draw, the
    model's own logits are taken instead."""

    def __init__(self, processors: list[LogitsProcessor], logits: Callable[[], torch.Tensor]) -> None:
        self._processors = LogitsProcessorList(processors)
        self._logits = logits

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        asked: torch.Tensor = self._processors(input_ids, scores)
        if bool((asked == -torch.inf).all()):
            asked = self._processors(input_ids, self._logits()[None].to(scores, copy=True))
        return asked


class _CountPenalties(LogitsProcessor):  # type: ignore[misc]
    """Subtracts the presence and frequency penalties of the ids generated so far."""

    def __init__(self, params: SamplingParams, num_before: int) -> None:
        self._params = params
        self._num_before = num_before

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        params = self._params
        counts = torch.bincount(input_ids[0, self._num_before :], minlength=scores.shape[1])
        return scores - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts


class _Steered(LogitsProcessor):  # type: ignore[misc]
    """Masks what the grammar does not allow next."""

    def __init__(self, grammar: GrammarState) -> None:
        self._grammar = grammar

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        mask_by_grammar(scores, {0: self._grammar})
        return scores


class _PositionSeed(LogitsProcessor):  # type: ignore[misc]
    """Seeds torch anew before each draw, by (seed, choice, position): a draw depends on nothing else."""

    def __init__(self, seed: int, choice: int, num_before: int) -> None:
        self._seed = seed
        self._choice = choice
        self._num_before = num_before

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        position = input_ids.shape[1] - self._num_before
        digest = hashlib.blake2b(struct.pack("<QQQ", self._seed, self._choice, position), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little"))
        return scores
