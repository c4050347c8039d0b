"""From a step's logits to its token ids, for the whole batch at once, each row by its own request's parameters.

The model runner calls it once a step. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from parleyd.generation import NUM_TOP_LOGPROBS, SamplingParams, TokenLogprob
from parleyd.model.upload import upload
from parleyd.sampling import draws
from parleyd.sampling.grammar_mask import mask_by_grammar
from parleyd.sampling.penalties import penalise
from parleyd.sampling.sampling_row import SamplingRow

# Below this, logits overflow; what it asks for is the greedy choice anyway.
MIN_TEMPERATURE = 1e-5
# A CPU draws for as many rows at once as have so many logits together, which its cache holds.
_CHUNK_SIZE = 2**19


class Logprobs(NamedTuple):
    """Natural logarithms of the model's own distribution: the log-softmax of the raw logits.

    `token_logprobs[i]` is of row `rows[i]`; of its `top_ids[i]`, the likeliest, `num_top[i]` were asked for.
    """

    rows: list[int]
    num_top: list[int]
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


@torch.no_grad()
def sample(
    logits: Tensor, rows: Sequence[SamplingRow], last_ids: Tensor, eos_token_ids: Collection[int]
) -> SampledTokens:
    """Greedy and random choice of the next tokens; the semantics and their order are those of transformers' processors.

    A row's token depends on its own logits and request alone, and the random number behind it on (seed, choice,
    position) alone: not on its neighbours, not on what was preempted or resumed.

    logits: [batch, vocab], any float type, in the rows' order; left as it is. last_ids: [batch], the id that each row's
    logits come from.
    """
    x = _changed(logits, rows, last_ids, eos_token_ids)
    token_ids = torch.empty(len(rows), dtype=torch.int64, device=x.device)
    # Of what was chosen, as NaN is taken for the largest, and infinity is.
    numbers = torch.empty(len(rows), dtype=torch.float32, device=x.device)
    if greedy := [index for index, row in enumerate(rows) if not row.params.do_sample]:
        index = _index(greedy, x.device)
        token_ids[index] = ids = draws.first_argmax(_as_float(x[index]))
        numbers[index] = _chosen(logits[index], ids).float()
    drawn = [index for index, row in enumerate(rows) if row.params.do_sample]
    chunk_size = max(1, len(drawn) if x.is_cuda else _CHUNK_SIZE // x.shape[1])
    for start in range(0, len(drawn), chunk_size):
        chunk = drawn[start : start + chunk_size]
        index, some = _index(chunk, x.device), [rows[row] for row in chunk]
        # Either makes all of a softmax NaN.
        probs = _probabilities(_as_float(x[index]), [row.params for row in some])
        keys = [draws.stream_key(row.params.seed, row.params.choice) for row in some]
        uniforms = [draws.uniform(key, row.position) for key, row in zip(keys, some, strict=True)]
        token_ids[index] = ids = draws.draw(probs, upload(np.array(uniforms), x.device))
        numbers[index] = _chosen(probs, ids)
    asked = [index for index, row in enumerate(rows) if row.params.logprobs]
    logprobs = _logprobs(logits, token_ids, rows, asked) if asked else None
    return SampledTokens(token_ids, numbers.isfinite(), logprobs)


def _index(rows: Sequence[int], device: torch.device) -> slice | Tensor:
    """What a tensor is indexed by for these of its rows, in order. Neighbours cost no copy."""
    neighbours = range(rows[0], rows[0] + len(rows))
    if list(rows) == list(neighbours):
        return slice(neighbours.start, neighbours.stop)
    return upload(np.array(rows, np.int64), device)


def _changed(logits: Tensor, rows: Sequence[SamplingRow], last_ids: Tensor, eos_token_ids: Collection[int]) -> Tensor:
    are_penalised = any(row.is_penalised for row in rows)
    steered = {index: row.grammar for index, row in enumerate(rows) if row.grammar is not None}
    if not are_penalised and not steered:
        return logits
    changed = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if are_penalised:
        penalise(changed, rows, last_ids, eos_token_ids)
    if steered:
        mask_by_grammar(changed, steered)
    return changed


def _chosen(numbers: Tensor, token_ids: Tensor) -> Tensor:
    """[rows]: of each row the number of one id. numbers: [rows, vocab]; token_ids: [rows]."""
    return numbers.gather(1, token_ids[:, None]).squeeze(1)


def _as_float(logits: Tensor) -> Tensor:
    return logits.float().contiguous()


def _probabilities(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """What the rows are drawn from, not scaled to 1. logits: [rows, vocab]."""

    def column(values: list[Any], dtype: type) -> Tensor:
        return upload(np.array(values, dtype)[:, None], logits.device)

    temperatures = [max(one.temperature, MIN_TEMPERATURE) for one in params]
    probs = (logits / column(temperatures, np.float32)).softmax(-1)
    top_ks = [one.top_k if one.top_k < logits.shape[1] else 0 for one in params]
    if any(top_ks):  # ties with the last are kept, as in transformers
        top_k = column(top_ks, np.int64)
        values, _ = draws.largest(logits, max(top_ks))
        kth = values.gather(1, (top_k - 1).clamp_(min=0)).masked_fill_(top_k == 0, -math.inf)
        probs *= logits.clone().ge_(kth)
    if any(one.top_p < 1.0 for one in params):
        probs = draws.keep_top_p(probs, column([one.top_p for one in params], np.float64))
    if any(one.min_p for one in params):
        min_p = column([one.min_p for one in params], np.float32)
        probs *= probs.clone().ge_(min_p * probs.amax(-1, keepdim=True))
    return probs


def _logprobs(logits: Tensor, token_ids: Tensor, rows: Sequence[SamplingRow], asked: list[int]) -> Logprobs:
    index = _index(asked, logits.device)
    logits = _as_float(logits[index])
    logprobs = logits.log_softmax(-1)
    _, top_ids = draws.largest(logits, min(NUM_TOP_LOGPROBS, logits.shape[1]))
    num_top = [rows[row].params.top_logprobs for row in asked]
    return Logprobs(asked, num_top, _chosen(logprobs, token_ids[index]), top_ids, logprobs.gather(1, top_ids))
