"""Changes to single logits: penalties on ids that have been used, biases, ids masked until enough are generated.

Called by the sampler. Made anew of a sequence's ids at each step, so nothing is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parleyd.model.upload import upload
from parleyd.sampling.sampling_row import SamplingRow

# Below this, logits overflow; what it asks for is the greedy choice anyway.
MIN_REPETITION_PENALTY = 1e-3


def penalise(logits: Tensor, batch: Sequence[SamplingRow], last_ids: Tensor, eos_token_ids: Iterable[int]) -> None:
    """Changes the logits of those that are penalised in place, in transformers' order: biases, repetition, mask.

    Presence and frequency penalties, which it lacks, come last, where its `generate` puts a caller's processors.
    An id that stands several times in a row's history has its logit written as often, each time the same.

    logits: [batch, vocab]. last_ids: [batch], the last id of each row, which the host may not know yet.
    """
    penalised = np.array([row.is_penalised for row in batch], bool).nonzero()[0]
    rows = [batch[index] for index in penalised.tolist()]
    flat, params = logits.view(-1), [row.params for row in rows]
    starts = penalised * logits.shape[1]

    def on_device(array: NDArray[Any]) -> Tensor:
        return upload(array, logits.device)

    def places(ids: list[NDArray[np.int64]]) -> Tensor:
        """Of these ids of each row in `flat`."""
        return on_device(np.concatenate(ids) + starts.repeat([len(one) for one in ids]))

    last = on_device(starts) + last_ids.index_select(0, on_device(penalised))

    def with_last(ids: list[NDArray[np.int64]], *numbers: list[float]) -> list[Tensor]:
        """The places of these ids of each row and of its last one, then for each of them the row's number."""
        counts = [len(one) for one in ids]
        columns = [np.array(one, np.float32) for one in numbers]
        return [torch.cat((places(ids), last)), *(on_device(np.append(one.repeat(counts), one)) for one in columns)]

    biases = [dict(one.logit_bias) for one in params]
    biased = places([np.array([*one], np.int64) for one in biases])
    flat.index_add_(0, biased, on_device(np.array([bias for one in biases for bias in one.values()], np.float32)))
    repetitions = [max(one.repetition_penalty, MIN_REPETITION_PENALTY) for one in params]
    used, repetition = with_last([row.ids(0) for row in rows], repetitions)
    x = flat[used]
    flat[used] = torch.where(x < 0, x * repetition, x / repetition)
    masked = [[*eos_token_ids, *row.params.stop_token_ids] if row.is_masked else [] for row in rows]
    flat.index_fill_(0, places([np.array(ids, np.int64) for ids in masked]), -math.inf)
    generated, presence, frequency = with_last(
        [row.ids(row.num_prompt_tokens) for row in rows],
        [row.params.presence_penalty if row.position else 0.0 for row in rows],
        [row.params.frequency_penalty if row.position else 0.0 for row in rows],
    )
    flat[generated] -= presence
    flat.index_add_(0, generated, frequency, alpha=-1)
