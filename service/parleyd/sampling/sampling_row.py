"""What one row of a step samples by. Made by the model runner, read by the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parleyd.generation import SamplingParams
from parleyd.grammar.state import GrammarState


class SamplingRow(NamedTuple):
    """One sequence whose next token is sampled.

    `position` counts the tokens generated before this one. `token_ids` (prompt, then output) may lack the latest of
    them while it is on its way from the device. `grammar` has taken all generated tokens.
    """

    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int
    position: int
    grammar: GrammarState | None = None

    @property
    def looks_back(self) -> bool:
        """Whether its penalties depend on the ids so far."""
        params = self.params
        return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0

    @property
    def is_masked(self) -> bool:
        """Whether ids that end an answer must not follow."""
        return self.position < self.params.min_new_tokens

    @property
    def is_penalised(self) -> bool:
        """Whether penalties, biases or that mask change its logits at all."""
        return self.looks_back or self.is_masked or bool(self.params.logit_bias)

    def ids(self, start: int) -> NDArray[np.int64]:
        """Those from `start` to before the last, where the penalties depend on them."""
        end = self.num_prompt_tokens + self.position - 1 if self.looks_back else start
        return np.array(self.token_ids[start:end], np.int64)
