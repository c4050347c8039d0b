"""From a step's logits to its token ids, for the whole batch at once, each row by its own request's parameters.

The model runner calls `prepare`, then `sample`, once each a step. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from parleyd.engine import draws
from parleyd.engine.penalties import PenalisedRow, Penalties, PenaltyTable, upload
from parleyd.generation import SamplingParams

# Below these, logits overflow; what they ask for is the greedy choice anyway. Engine `generate` has the same.
_MIN_TEMPERATURE = 1e-5
_MIN_REPETITION_PENALTY = 1e-3
# The limit of the API. Always as many, since which of equal logits come first may depend on how many are asked for.
_NUM_TOP_LOGPROBS = 20


class SamplingRow(NamedTuple):
    """One sequence whose next token is sampled.

    `position` counts the tokens generated before this one. `token_ids` (prompt, then output) may lack the latest of
    them while they are on their way from the device, as long as the row was in the step before. `key` is unique in the
    batch, and stands for one request and its parameters for good.
    """

    key: int
    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int
    position: int


class Logprobs(NamedTuple):
    """Natural logarithms of the model's own distribution: the log-softmax of the raw logits.

    `token_logprobs[i]` is of row `rows[i]`; of its `top_ids[i]`, the likeliest first, `num_top[i]` were asked for.
    """

    rows: tuple[int, ...]
    num_top: tuple[int, ...]
    token_logprobs: Tensor  # [len(rows)], float32
    top_ids: Tensor | None  # [len(rows), 20 or the vocabulary], int64; None: nobody asked
    top_logprobs: Tensor | None  # of the same shape, float32


class SampledTokens(NamedTuple):
    """What a step sampled, on its device."""

    token_ids: Tensor  # [batch], int64
    logprobs: Logprobs | None  # None: nobody asked


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """A request's parameters as the sampler needs them: in safe ranges, None for what does nothing."""

    is_greedy: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float
    penalties: Penalties
    stream_key: int
    num_top_logprobs: int | None  # None: no log-probabilities at all

    @classmethod
    def of(cls, params: SamplingParams, vocab_size: int, eos_token_ids: frozenset[int]) -> _Settings:
        num_top = getattr(params, "top_logprobs", 0)
        return cls(
            is_greedy=not params.do_sample or params.temperature == 0.0,
            temperature=max(params.temperature, _MIN_TEMPERATURE),
            top_k=params.top_k if 0 < params.top_k < vocab_size else None,
            top_p=params.top_p if params.top_p < 1.0 else None,
            min_p=params.min_p,
            penalties=Penalties(
                repetition=max(params.repetition_penalty, _MIN_REPETITION_PENALTY),
                presence=getattr(params, "presence_penalty", 0.0),
                frequency=getattr(params, "frequency_penalty", 0.0),
                bias=dict(getattr(params, "logit_bias", ())),
                masked_ids=eos_token_ids.union(params.stop_token_ids),
                min_new_tokens=params.min_new_tokens,
            ),
            stream_key=draws.stream_key(params.seed, getattr(params, "choice", 0)),
            num_top_logprobs=num_top if num_top or getattr(params, "logprobs", False) else None,
        )


class _Rows:
    """Some rows of a tensor; all of them cost no copy."""

    def __init__(self, rows: Sequence[int], num_rows: int, device: torch.device) -> None:
        self.rows = tuple(rows)
        self._index = None if len(rows) == num_rows else upload(np.array(rows, np.int64), device)

    def __bool__(self) -> bool:
        return bool(self.rows)

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self._index is None else tensor.index_select(0, self._index)

    def put(self, tensor: Tensor, values: Tensor) -> Tensor:
        return values if self._index is None else tensor.index_copy_(0, self._index, values)


class SamplingBatch:
    """The rows of a step, sorted by what has to be done for them. Lives on while the rows stay the same."""

    def __init__(self, keys: list[int], settings: list[_Settings], device: torch.device) -> None:
        size = len(settings)
        self.keys = keys
        self.size = size
        self.greedy = _Rows([row for row, one in enumerate(settings) if one.is_greedy], size, device)
        self.drawn = _Rows([row for row, one in enumerate(settings) if not one.is_greedy], size, device)
        drawn = [settings[row] for row in self.drawn.rows]
        self.stream_keys = np.array([one.stream_key for one in drawn], np.uint64)
        self.temperature = upload(np.array([[one.temperature] for one in drawn], np.float32), device)
        self.min_p: Tensor | None = None
        if any(one.min_p for one in drawn):
            self.min_p = upload(np.array([[one.min_p] for one in drawn], np.float32), device)
        self._prepare_truncation(drawn, device)
        asked = [(row, one.num_top_logprobs) for row, one in enumerate(settings) if one.num_top_logprobs is not None]
        self.logprobs = _Rows([row for row, _ in asked], size, device)
        self.num_top = tuple(num_top for _, num_top in asked)
        self.uniforms = torch.empty(0)  # one for each drawn row; new at each step

    def _prepare_truncation(self, drawn: list[_Settings], device: torch.device) -> None:
        """The rows, counted among the drawn ones, with top_k (and perhaps top_p), and with top_p alone."""
        top_k = [row for row, one in enumerate(drawn) if one.top_k is not None]
        top_p = [row for row, one in enumerate(drawn) if one.top_k is None and one.top_p is not None]
        self.top_k = _Rows(top_k, len(drawn), device)
        self.top_p = _Rows(top_p, len(drawn), device)
        ks = [drawn[row].top_k or 0 for row in top_k]
        ps = [drawn[row].top_p for row in top_k]
        self.max_top_k = max(ks, default=0)
        self.top_k_of_rows = upload(np.array(ks, np.int64)[:, None], device)
        self.top_p_in_top_k: Tensor | None = None
        if any(p is not None for p in ps):
            self.top_p_in_top_k = upload(np.array([[1.0 if p is None else p] for p in ps], np.float64), device)
        self.top_p_of_rows = upload(np.array([[drawn[row].top_p] for row in top_p], np.float64), device)


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
        self._penalty_table = PenaltyTable(vocab_size, device)
        self._penalises = False
        self._batch: SamplingBatch | None = None

    def prepare(self, rows: Sequence[SamplingRow]) -> SamplingBatch:
        """The batch of a step; to be sampled once, and before the next is prepared.

        Raises ValueError where a row with penalties is new in the batch and not all its ids are known.
        """
        keys = [row.key for row in rows]
        batch = self._batch
        if batch is None or batch.keys != keys:
            known = self._settings
            self._settings = {row.key: known.get(row.key) or self._settings_of(row) for row in rows}
            batch = self._batch = SamplingBatch(keys, list(self._settings.values()), self._device)
            self._update_penalties(rows)
        elif self._penalises and not self._penalty_table.is_at(self._penalised(rows)):
            self._update_penalties(rows)
        if batch.drawn:
            positions = np.array([rows[row].position for row in batch.drawn.rows], np.uint64)
            batch.uniforms = upload(draws.uniforms(batch.stream_keys, positions), self._device)
        return batch

    def _settings_of(self, row: SamplingRow) -> _Settings:
        return _Settings.of(row.params, self._vocab_size, self._eos_token_ids)

    def _penalised(self, rows: Sequence[SamplingRow]) -> list[PenalisedRow]:
        return [
            PenalisedRow(index, row.key, penalties, row.token_ids, row.num_prompt_tokens, row.position)
            for index, row in enumerate(rows)
            if (penalties := self._settings[row.key].penalties).change_logits(row.position)
        ]

    def _update_penalties(self, rows: Sequence[SamplingRow]) -> None:
        penalised = self._penalised(rows)
        self._penalty_table.update(penalised)
        self._penalises = bool(penalised)

    @torch.no_grad()
    def sample(self, logits: Tensor, batch: SamplingBatch) -> SampledTokens:
        """Chooses a token for each row. logits: [batch, vocab], any float type, in the rows' order; left as it is."""
        raw = logits.float().contiguous()
        x = raw
        if self._penalises:
            x = raw.clone() if raw.data_ptr() == logits.data_ptr() or batch.logprobs else raw
            self._penalty_table.apply(x)
        token_ids = torch.empty(batch.size if batch.greedy and batch.drawn else 0, dtype=torch.int64, device=x.device)
        if batch.greedy:
            token_ids = batch.greedy.put(token_ids, draws.first_argmax(batch.greedy.of(x)))
        if batch.drawn:
            x = batch.drawn.of(x)
            token_ids = batch.drawn.put(token_ids, draws.draw(_probabilities(x, batch), batch.uniforms))
        if self._penalises:
            self._penalty_table.record(token_ids)
        return SampledTokens(token_ids, _logprobs(raw, token_ids, batch) if batch.logprobs else None)


def _probabilities(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """What the drawn rows are drawn from, not scaled to 1: [drawn rows, vocab]."""
    probs = (logits / batch.temperature).softmax(-1)
    if rows := batch.top_k:
        x, temperature = rows.of(logits), rows.of(batch.temperature)
        cut = draws.top_k_cut(x, temperature, batch.top_k_of_rows, batch.max_top_k, batch.top_p_in_top_k)
        probs = rows.put(probs, cut.apply(x, rows.of(probs)))
    if rows := batch.top_p:
        x, kept = rows.of(logits), rows.of(probs)
        cut = draws.top_p_cut(x, kept, rows.of(batch.temperature), batch.top_p_of_rows)
        probs = rows.put(probs, cut.apply(x, kept))
    if batch.min_p is not None:
        probs.masked_fill_(probs < batch.min_p * probs.amax(-1, keepdim=True), 0.0)
    return probs


def _logprobs(logits: Tensor, token_ids: Tensor, batch: SamplingBatch) -> Logprobs:
    rows = batch.logprobs
    logits = rows.of(logits)
    logprobs = logits.log_softmax(-1)
    token_logprobs = logprobs.gather(1, rows.of(token_ids)[:, None]).squeeze(1)
    top_ids = top_logprobs = None
    if any(batch.num_top):
        _, top_ids = draws.largest(logits, min(_NUM_TOP_LOGPROBS, logits.shape[1]))
        top_logprobs = logprobs.gather(1, top_ids)
    return Logprobs(rows.rows, batch.num_top, token_logprobs, top_ids, top_logprobs)
