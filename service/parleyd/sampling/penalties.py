"""Changes to single logits: penalties on ids that have been used, biases, ids masked until enough are generated.

Called by the sampler. Made anew of a sequence's ids at each step, so nothing is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parleyd.model.upload import upload


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties:
    """One request's changes to its logits."""

    repetition: float
    presence: float
    frequency: float
    bias_ids: NDArray[np.int64]
    biases: NDArray[np.float32]
    masked_ids: NDArray[np.int64]  # until `min_new_tokens` are generated
    min_new_tokens: int

    @property
    def look_back(self) -> bool:
        """Whether they depend on the ids so far."""
        return self.repetition != 1.0 or self.presence != 0.0 or self.frequency != 0.0

    def masks(self, position: int) -> bool:
        """Whether ids are masked at generated token `position`."""
        return position < self.min_new_tokens and len(self.masked_ids) > 0

    def change_logits(self, position: int) -> bool:
        """Whether they do anything at generated token `position`."""
        return self.look_back or len(self.bias_ids) > 0 or self.masks(position)


class PenalisedRow(NamedTuple):
    """A row of the batch whose logits change. `token_ids` may lack the last of the `position` generated ids."""

    row: int
    penalties: Penalties
    token_ids: Sequence[int]
    num_prompt_tokens: int
    position: int

    def ids(self, start: int) -> NDArray[np.int64]:
        """Those from `start` to before the last, where the penalties depend on them."""
        end = self.num_prompt_tokens + self.position - 1 if self.penalties.look_back else start
        return np.array(self.token_ids[start:end], np.int64)


def penalise(logits: Tensor, rows: Sequence[PenalisedRow], last_ids: Tensor) -> None:
    """Changes the logits in place, in transformers' order: biases, repetition, mask.

    Presence and frequency penalties, which it lacks, come last, where its `generate` puts a caller's processors.
    An id that stands several times in a row's history has its logit written as often, each time the same.

    logits: [batch, vocab]. last_ids: [batch], the last id of each row, which the host may not know yet.
    """
    flat, penalties = logits.view(-1), [row.penalties for row in rows]
    starts = np.array([row.row for row in rows]) * logits.shape[1]

    def on_device(array: NDArray[Any]) -> Tensor:
        return upload(array, logits.device)

    def places(ids: list[NDArray[np.int64]]) -> Tensor:
        """Of these ids of each row in `flat`."""
        return on_device(np.concatenate(ids) + starts.repeat([len(one) for one in ids]))

    last = on_device(starts) + last_ids.index_select(0, on_device(np.array([row.row for row in rows])))

    def with_last(ids: list[NDArray[np.int64]], *numbers: list[float]) -> list[Tensor]:
        """The places of these ids of each row and of its last one, then for each of them the row's number."""
        counts = [len(one) for one in ids]
        columns = [np.array(one, np.float32) for one in numbers]
        return [torch.cat((places(ids), last)), *(on_device(np.append(one.repeat(counts), one)) for one in columns)]

    biases = on_device(np.concatenate([one.biases for one in penalties]))
    flat.index_add_(0, places([one.bias_ids for one in penalties]), biases)
    used, repetition = with_last([row.ids(0) for row in rows], [one.repetition for one in penalties])
    x = flat[used]
    flat[used] = torch.where(x < 0, x * repetition, x / repetition)
    masked = [row.penalties.masked_ids[: None if row.penalties.masks(row.position) else 0] for row in rows]
    flat[places(masked)] = -math.inf
    generated, presence, frequency = with_last(
        [row.ids(row.num_prompt_tokens) for row in rows],
        [row.penalties.presence if row.position else 0.0 for row in rows],
        [row.penalties.frequency if row.position else 0.0 for row in rows],
    )
    flat[generated] -= presence
    flat.index_add_(0, generated, frequency, alpha=-1)
