"""From a step's logits to its token ids, for the whole batch at once, each row by its own request's parameters.

The model runner calls `prepare`, then `sample`, once each a step. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from parleyd.generation import NUM_TOP_LOGPROBS, SamplingParams, TokenLogprob
from parleyd.model.upload import upload
from parleyd.sampling import draws
from parleyd.sampling.grammar import GrammarRow, GrammarState, mask_by_grammar
from parleyd.sampling.penalties import PenalisedRow, Penalties, penalise

# Below these, logits overflow; what they ask for is the greedy choice anyway.
MIN_TEMPERATURE = 1e-5
MIN_REPETITION_PENALTY = 1e-3
# A CPU draws for as many rows at once as have so many logits together, which its cache holds.
_CHUNK_SIZE = 2**19


class SamplingRow(NamedTuple):
    """One sequence whose next token is sampled.

    `position` counts the tokens generated before this one. `token_ids` (prompt, then output) may lack the latest of
    them while it is on its way from the device. `key` is unique in the batch, and stands for one request and its
    parameters for good. `grammar` has taken all generated tokens.
    """

    key: int
    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int
    position: int
    grammar: GrammarState | None = None


class Logprobs(NamedTuple):
    """Natural logarithms of the model's own distribution: the log-softmax of the raw logits.

    `token_logprobs[i]` is of row `rows[i]`; of its `top_ids[i]`, the likeliest, `num_top[i]` were asked for.
    """

    rows: tuple[int, ...]
    num_top: tuple[int, ...]
    token_logprobs: Tensor  # [len(rows)], float32
    top_ids: Tensor  # [len(rows), 20 or the vocabulary], int64
    top_logprobs: Tensor  # of the same shape, float32

    def by_row(self) -> dict[int, TokenLogprob]:
        """On the host, for each row that asked. Waits for the device."""
        pairs = zip(self.num_top, self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True)
        tops = [TokenLogprob.best(ids, values, num) for num, ids, values in pairs]
        return dict(zip(self.rows, map(TokenLogprob, self.token_logprobs.tolist(), tops), strict=True))


class SampledTokens(NamedTuple):
    """What a step sampled, on its device."""

    token_ids: Tensor  # [batch], int64
    are_finite: Tensor  # [batch], bool; false where an id, though one of the vocabulary's, is of NaN or infinite logits
    logprobs: Logprobs | None  # None: nobody asked


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """A request's parameters as the sampler needs them: in safe ranges."""

    is_greedy: bool
    temperature: float
    top_k: int  # 0: all
    top_p: float
    min_p: float
    penalties: Penalties
    stream_key: int
    num_top_logprobs: int | None  # None: no log-probabilities at all

    @classmethod
    def of(cls, params: SamplingParams, vocab_size: int, eos_token_ids: frozenset[int]) -> _Settings:
        bias = dict(params.logit_bias)
        return cls(
            is_greedy=not params.do_sample or params.temperature == 0.0,
            temperature=max(params.temperature, MIN_TEMPERATURE),
            top_k=params.top_k if params.top_k < vocab_size else 0,
            top_p=params.top_p,
            min_p=params.min_p,
            penalties=Penalties(
                repetition=max(params.repetition_penalty, MIN_REPETITION_PENALTY),
                presence=params.presence_penalty,
                frequency=params.frequency_penalty,
                bias_ids=np.array([*bias], np.int64),
                biases=np.array([*bias.values()], np.float32),
                masked_ids=np.array([*eos_token_ids.union(params.stop_token_ids)], np.int64),
                min_new_tokens=params.min_new_tokens,
            ),
            stream_key=draws.stream_key(params.seed, params.choice),
            num_top_logprobs=params.top_logprobs if params.logprobs else None,
        )


class _Rows:
    """Some rows of a tensor, in order. All of them cost no copy."""

    def __init__(self, rows: Sequence[int], num_rows: int, device: torch.device) -> None:
        self.rows = tuple(rows)
        self._index = None if len(rows) == num_rows else upload(np.array(rows, np.int64), device)

    def __bool__(self) -> bool:
        return bool(self.rows)

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self._index is None else tensor.index_select(0, self._index)

    def put(self, tensor: Tensor, values: Tensor) -> Tensor:
        """The tensor with the values in these rows: in place, or the values where they are all."""
        return values if self._index is None else tensor.index_copy_(0, self._index, values)


class _DrawnRows:
    """Rows of the batch that are drawn at random together, and their parameters."""

    def __init__(self, rows: Sequence[int], every: Sequence[_Settings], device: torch.device) -> None:
        self.rows = _Rows(rows, len(every), device)
        settings = [every[row] for row in rows]
        self.stream_keys = np.array([one.stream_key for one in settings], np.uint64)
        self.uniforms = torch.empty(0)  # [rows], float64; new at each step
        self.temperature = upload(np.array([[one.temperature] for one in settings], np.float32), device)
        # Of a row without one: what does nothing. None where no row has one.
        self.top_k = self._column([one.top_k for one in settings], 0, np.int64, device)
        self.max_top_k = max(one.top_k for one in settings)
        self.top_p = self._column([one.top_p for one in settings], 1.0, np.float64, device)
        self.min_p = self._column([one.min_p for one in settings], 0.0, np.float32, device)

    @staticmethod
    def _column(values: list[Any], neutral: float, dtype: type, device: torch.device) -> Tensor | None:
        return upload(np.array(values, dtype)[:, None], device) if any(value != neutral for value in values) else None


class SamplingBatch:
    """The rows of a step, sorted by what has to be done for them. Lives on while the rows stay the same."""

    def __init__(self, keys: list[int], settings: list[_Settings], vocab_size: int, device: torch.device) -> None:
        self.keys = keys
        self.size = len(keys)
        self.greedy = _Rows([row for row, one in enumerate(settings) if one.is_greedy], self.size, device)
        drawn = [row for row, one in enumerate(settings) if not one.is_greedy]
        size = self.size if device.type == "cuda" else max(1, _CHUNK_SIZE // vocab_size)
        chunks = [drawn[start : start + size] for start in range(0, len(drawn), size or 1)]
        self.drawn = [_DrawnRows(chunk, settings, device) for chunk in chunks]
        asked = [(row, one.num_top_logprobs) for row, one in enumerate(settings) if one.num_top_logprobs is not None]
        self.logprobs = _Rows([row for row, _ in asked], self.size, device)
        self.num_top = tuple(num_top for _, num_top in asked)
        # New at each step.
        self.penalised: list[PenalisedRow] = []
        self.steered: list[GrammarRow] = []


class Sampler:
    """Greedy and random choice of the next tokens; the semantics and their order are those of transformers' processors.

    A row's token depends on its own logits and request alone, and the random number behind it on (seed, choice,
    position) alone: not on its neighbours, not on what was preempted or resumed.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int], device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._device = device
        self._settings: dict[int, _Settings] = {}
        self._batch: SamplingBatch | None = None

    def prepare(self, rows: Sequence[SamplingRow]) -> SamplingBatch:
        """The batch of a step; to be sampled once, and before the next is prepared."""
        keys = [row.key for row in rows]
        batch = self._batch
        if batch is None or batch.keys != keys:
            known = self._settings
            self._settings = {row.key: known.get(row.key) or self._settings_of(row) for row in rows}
            batch = self._batch = SamplingBatch(keys, list(self._settings.values()), self._vocab_size, self._device)
        batch.penalised = self._penalised(rows)
        batch.steered = [
            GrammarRow(i, row.grammar, row.position) for i, row in enumerate(rows) if row.grammar is not None
        ]
        for drawn in batch.drawn:
            positions = np.array([rows[row].position for row in drawn.rows.rows], np.uint64)
            drawn.uniforms = upload(draws.uniforms(drawn.stream_keys, positions), self._device)
        return batch

    def _settings_of(self, row: SamplingRow) -> _Settings:
        return _Settings.of(row.params, self._vocab_size, self._eos_token_ids)

    def _penalised(self, rows: Sequence[SamplingRow]) -> list[PenalisedRow]:
        return [
            PenalisedRow(index, penalties, row.token_ids, row.num_prompt_tokens, row.position)
            for index, row in enumerate(rows)
            if (penalties := self._settings[row.key].penalties).change_logits(row.position)
        ]

    @torch.no_grad()
    def sample(self, logits: Tensor, batch: SamplingBatch, last_ids: Tensor) -> SampledTokens:
        """Chooses a token for each row. logits: [batch, vocab], any float type, in the rows' order; left as it is.

        last_ids: [batch], the id that each row's logits come from.
        """
        x = self._changed(logits, batch, last_ids)
        token_ids = torch.empty(batch.size, dtype=torch.int64, device=x.device)
        # Of what was chosen, as NaN is taken for the largest, and infinity is.
        numbers = torch.empty(batch.size, dtype=torch.float32, device=x.device)
        if batch.greedy:
            ids = draws.first_argmax(_as_float(batch.greedy.of(x)))
            token_ids = batch.greedy.put(token_ids, ids)
            numbers = batch.greedy.put(numbers, _chosen(batch.greedy.of(logits), ids).float())
        for drawn in batch.drawn:
            # Either makes all of a softmax NaN.
            probs = _probabilities(_as_float(drawn.rows.of(x)), drawn)
            ids = draws.draw(probs, drawn.uniforms)
            token_ids, numbers = drawn.rows.put(token_ids, ids), drawn.rows.put(numbers, _chosen(probs, ids))
        logprobs = _logprobs(logits, token_ids, batch) if batch.logprobs else None
        return SampledTokens(token_ids, numbers.isfinite(), logprobs)

    def _changed(self, logits: Tensor, batch: SamplingBatch, last_ids: Tensor) -> Tensor:
        if not batch.penalised and not batch.steered:
            return logits
        changed = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if batch.penalised:
            penalise(changed, batch.penalised, last_ids)
        if batch.steered:
            mask_by_grammar(changed, batch.steered)
        return changed


def _chosen(numbers: Tensor, token_ids: Tensor) -> Tensor:
    """[rows]: of each row the number of one id. numbers: [rows, vocab]; token_ids: [rows]."""
    return numbers.gather(1, token_ids[:, None]).squeeze(1)


def _as_float(logits: Tensor) -> Tensor:
    return logits.float().contiguous()


def _probabilities(logits: Tensor, drawn: _DrawnRows) -> Tensor:
    """What the rows are drawn from, not scaled to 1. logits: [drawn rows, vocab]."""
    probs = (logits / drawn.temperature).softmax(-1)
    if drawn.top_k is not None:  # ties with the last are kept, as in transformers
        values, _ = draws.largest(logits, drawn.max_top_k)
        kth = values.gather(1, (drawn.top_k - 1).clamp_(min=0)).masked_fill_(drawn.top_k == 0, -math.inf)
        probs *= logits.clone().ge_(kth)
    if drawn.top_p is not None:
        probs = draws.keep_top_p(probs, drawn.top_p)
    if drawn.min_p is not None:
        probs *= probs.clone().ge_(drawn.min_p * probs.amax(-1, keepdim=True))
    return probs


def _logprobs(logits: Tensor, token_ids: Tensor, batch: SamplingBatch) -> Logprobs:
    rows = batch.logprobs
    logits = _as_float(rows.of(logits))
    logprobs = logits.log_softmax(-1)
    token_logprobs = _chosen(logprobs, rows.of(token_ids))
    _, top_ids = draws.largest(logits, min(NUM_TOP_LOGPROBS, logits.shape[1]))
    return Logprobs(rows.rows, batch.num_top, token_logprobs, top_ids, logprobs.gather(1, top_ids))
