"""What gateway and worker say to each other about generation: token ids in, token ids out. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

# The limit of the API. Engines look for as many always, or which of equal ones are told would depend on how many are.
NUM_TOP_LOGPROBS = 20
# Why a request fails whose next token cannot be told: one of its own numbers overflowed, or the weights are broken.
NOT_FINITE = "the model's logits are not finite"


class Range(NamedTuple):
    """The values that a field may have. NaN and infinities are outside."""

    lowest: float
    highest: float
    includes_lowest: bool = True

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and (
            self.lowest < value <= self.highest or (self.includes_lowest and value == self.lowest)
        )

    def __str__(self) -> str:
        return f"{'' if self.includes_lowest else 'above '}{self.lowest} to {self.highest}"


# Of requests and of models' own defaults.
RANGES = {
    "temperature": Range(0, 10),
    "top_p": Range(0, 1, includes_lowest=False),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(0, 10, includes_lowest=False),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "num_return_sequences": Range(1, 16),
    "top_logprobs": Range(0, 20),
}


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"  # STOP, where the gateway finds tool calls in the text


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw the tokens of one sequence; every value resolved and in range (see generation.proto).

    `choice` is the sequence's place among those of its request. `logprobs` is true wherever `top_logprobs` is not 0.
    `grammar` is what the text must follow, in llguidance's language (see grammar/formats.py); empty: nothing.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    choice: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    grammar: str = ""


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """One sequence to generate. `key` is made by the gateway and unique for its lifetime, unlike clients' request ids.

    `output_ids` are ids already generated and delivered: a request handed to another worker goes on after them. Only
    requests of the same `cache_salt` share cached prefixes.
    """

    key: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    output_ids: tuple[int, ...] = ()
    priority: int = 0
    cache_salt: str = ""


class TokenLogprob(NamedTuple):
    """Natural logarithms of the model's own distribution at one position (log-softmax of the raw logits).

    `logprob` is the generated token's; `top` are (id, log-probability) of the most likely ones, best first, equal
    ones by id: as the greedy choice goes.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @staticmethod
    def best(ids: Sequence[int], logprobs: Sequence[float], number: int) -> tuple[tuple[int, float], ...]:
        """So many of these as `top`."""
        return tuple(sorted(zip(ids, logprobs, strict=True), key=lambda one: (-one[1], one[0]))[:number])


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one step made for one request. The last one has a `finish_reason`, an `error` or a `grammar_error`.

    `grammar_error` is the request's own: its grammar cannot be followed any further.
    `logprobs`: one for each of `token_ids` where the request asks for them, else none.
    `cached_prompt_tokens`: of the prompt, how many were found in the prefix cache.
    """

    key: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    grammar_error: str | None = None
    cached_prompt_tokens: int = 0

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None or self.grammar_error is not None


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """The values of a model's `generation_config.json` that requests may set; None, or no stop strings, where it sets
    none."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    num_return_sequences: int | None = None
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the gateway must know about the loaded model.

    `tokenizer_dir` is a local folder with `tokenizer.json` and the tokenizer's configuration and chat template.
    """

    tokenizer_dir: str
    max_context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    engine: str
    max_running: int
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What an engine has to do, and what it has done since it started; an engine without blocks or a cache tells 0."""

    num_waiting: int = 0
    num_running: int = 0
    num_blocks: int = 0
    num_used_blocks: int = 0
    num_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
