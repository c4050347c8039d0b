"""From a step's logits to its token ids, for the whole batch at once, each row by its own request's parameters.

The model runner calls it once a step. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
        )


class _Rows:
    """Some rows of a tensor, in order. All of them cost no copy."""

    def __init__(self, rows: Sequence[int], num_rows: int, device: torch.device) -> None:
        self.rows = tuple(rows)
        self._index = upload(np.array(rows, np.int64), device) if 0 < len(rows) < num_rows else None

    def __bool__(self) -> bool:
        return bool(self.rows)

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self._index is None else tensor.index_select(0, self._index)

    def put(self, tensor: Tensor, values: Tensor) -> Tensor:
        """The tensor with the values in these rows: in place, or the values where they are all."""
        return values if self._index is None else tensor.index_copy_(0, self._index, values)


class Sampler:
    """Greedy and random choice of the next tokens; the semantics and their order are those of transformers' processors.

    A row's token depends on its own logits and request alone, and the random number behind it on (seed, choice,
    position) alone: not on its neighbours, not on what was preempted or resumed.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int], device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._device = device
        self._settings: dict[int, _Settings] = {}  # by key

    @torch.no_grad()
    def sample(self, logits: Tensor, rows: Sequence[SamplingRow], last_ids: Tensor) -> SampledTokens:
        """Chooses a token for each row. logits: [batch, vocab], any float type, in the rows' order; left as it is.

        last_ids: [batch], the id that each row's logits come from.
        """
        settings = self._settings_of(rows)
        x = _changed(logits, rows, settings, last_ids)
        token_ids = torch.empty(len(rows), dtype=torch.int64, device=x.device)
        # Of what was chosen, as NaN is taken for the largest, and infinity is.
        numbers = torch.empty(len(rows), dtype=torch.float32, device=x.device)
        if greedy := self._rows([one.is_greedy for one in settings]):
            ids = draws.first_argmax(_as_float(greedy.of(x)))
            token_ids = greedy.put(token_ids, ids)
            numbers = greedy.put(numbers, _chosen(greedy.of(logits), ids).float())
        for drawn in self._chunks([row for row, one in enumerate(settings) if not one.is_greedy], len(rows)):
            # Either makes all of a softmax NaN.
            probs = _probabilities(_as_float(drawn.of(x)), [settings[row] for row in drawn.rows])
            keys = np.array([settings[row].stream_key for row in drawn.rows], np.uint64)
            positions = np.array([rows[row].position for row in drawn.rows], np.uint64)
            ids = draws.draw(probs, upload(draws.uniforms(keys, positions), self._device))
            token_ids, numbers = drawn.put(token_ids, ids), drawn.put(numbers, _chosen(probs, ids))
        asked = self._rows([row.params.logprobs for row in rows])
        logprobs = _logprobs(logits, token_ids, rows, asked) if asked else None
        return SampledTokens(token_ids, numbers.isfinite(), logprobs)

    def _settings_of(self, rows: Sequence[SamplingRow]) -> list[_Settings]:
        known = self._settings
        self._settings = {
            row.key: known.get(row.key) or _Settings.of(row.params, self._vocab_size, self._eos_token_ids)
            for row in rows
        }
        return list(self._settings.values())

    def _rows(self, flags: Sequence[bool]) -> _Rows:
        return _Rows([row for row, flag in enumerate(flags) if flag], len(flags), self._device)

    def _chunks(self, rows: list[int], num_rows: int) -> Iterator[_Rows]:
        """The rows that are drawn together."""
        size = num_rows if self._device.type == "cuda" else max(1, _CHUNK_SIZE // self._vocab_size)
        for start in range(0, len(rows), size):
            yield _Rows(rows[start : start + size], num_rows, self._device)


def _changed(logits: Tensor, rows: Sequence[SamplingRow], settings: list[_Settings], last_ids: Tensor) -> Tensor:
    penalised = [
        PenalisedRow(index, one.penalties, row.token_ids, row.num_prompt_tokens, row.position)
        for index, (row, one) in enumerate(zip(rows, settings, strict=True))
        if one.penalties.change_logits(row.position)
    ]
    steered = [GrammarRow(i, row.grammar, row.position) for i, row in enumerate(rows) if row.grammar is not None]
    if not penalised and not steered:
        return logits
    changed = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if penalised:
        penalise(changed, penalised, last_ids)
    if steered:
        mask_by_grammar(changed, steered)
    return changed


def _chosen(numbers: Tensor, token_ids: Tensor) -> Tensor:
    """[rows]: of each row the number of one id. numbers: [rows, vocab]; token_ids: [rows]."""
    return numbers.gather(1, token_ids[:, None]).squeeze(1)


def _as_float(logits: Tensor) -> Tensor:
    return logits.float().contiguous()


def _probabilities(logits: Tensor, settings: list[_Settings]) -> Tensor:
    """What the rows are drawn from, not scaled to 1. logits: [rows, vocab]."""

    def column(values: list[Any], dtype: type) -> Tensor:
        return upload(np.array(values, dtype)[:, None], logits.device)

    probs = (logits / column([one.temperature for one in settings], np.float32)).softmax(-1)
    if max_top_k := max(one.top_k for one in settings):  # ties with the last are kept, as in transformers
        top_k = column([one.top_k for one in settings], np.int64)
        values, _ = draws.largest(logits, max_top_k)
        kth = values.gather(1, (top_k - 1).clamp_(min=0)).masked_fill_(top_k == 0, -math.inf)
        probs *= logits.clone().ge_(kth)
    if any(one.top_p < 1.0 for one in settings):
        probs = draws.keep_top_p(probs, column([one.top_p for one in settings], np.float64))
    if any(one.min_p for one in settings):
        min_p = column([one.min_p for one in settings], np.float32)
        probs *= probs.clone().ge_(min_p * probs.amax(-1, keepdim=True))
    return probs


def _logprobs(logits: Tensor, token_ids: Tensor, rows: Sequence[SamplingRow], asked: _Rows) -> Logprobs:
    logits = _as_float(asked.of(logits))
    logprobs = logits.log_softmax(-1)
    token_logprobs = _chosen(logprobs, asked.of(token_ids))
    _, top_ids = draws.largest(logits, min(NUM_TOP_LOGPROBS, logits.shape[1]))
    num_top = tuple(rows[row].params.top_logprobs for row in asked.rows)
    return Logprobs(asked.rows, num_top, token_logprobs, top_ids, logprobs.gather(1, top_ids))
