"""What is asked of a server or an engine: seeded conversations, their answers' lengths, when they arrive.

No two prompts of a workload are alike, so that no prefix cache answers for the model. Standard library only: peers'
environments import this too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

# One token each in the embedded model's vocabulary, with the space before it.
_WORDS = ("river", "stone", "cloud", "engine", "garden", "winter", "letter", "signal", "copper", "island", "mirror")
_QUESTION = "Write a long story about:"
# Of the embedded model's chat template, its default system prompt and the question.
_TEMPLATE_TOKENS = 36
# Of the template alone, around a system message and a question. Prompts that leave no room for the default system
# prompt, the question and some words have one word as their system message, and at least one as their question.
_SHORT_TEMPLATE_TOKENS, _FEWEST_WORDS = 14, 8
_FIXED_PROMPT_TOKENS = 64
_SHARED_PROMPT_TOKENS = 1000
# The log-normal distributions: medians of ordinary chat traffic, cut off at both ends.
_PROMPT_RANGE, _PROMPT_MEDIAN, _PROMPT_SIGMA = (16, 1500), 200, 1.0
_ANSWER_RANGE, _ANSWER_MEDIAN, _ANSWER_SIGMA = (16, 512), 100, 0.8


@dataclass(frozen=True)
class Request:
    """One conversation (role, content), the exact number of tokens wanted back, and when it arrives.

    `priority`: for our service alone.
    """

    messages: tuple[tuple[str, str], ...]
    new_tokens: int
    arrival_s: float = 0.0
    priority: int = 0


def fixed(seed: int, num_requests: int, new_tokens: int, prompt_tokens: int = _FIXED_PROMPT_TOKENS) -> list[Request]:
    """Prompts of one length."""
    chance = random.Random(seed)
    return [_ask(chance, prompt_tokens, new_tokens) for _ in range(num_requests)]


def mixed(seed: int, num_requests: int) -> list[Request]:
    """Prompts of 16 to 1,500 tokens and answers of 16 to 512, both log-normal."""
    chance = random.Random(seed)
    requests: dict[tuple[tuple[str, str], ...], Request] = {}
    while len(requests) < num_requests:  # the shortest have so few words that some come twice
        request = _ask(
            chance,
            _log_normal(chance, _PROMPT_MEDIAN, _PROMPT_SIGMA, _PROMPT_RANGE),
            _log_normal(chance, _ANSWER_MEDIAN, _ANSWER_SIGMA, _ANSWER_RANGE),
        )
        requests.setdefault(request.messages, request)
    return list(requests.values())


def shared_prefix(seed: int, num_users: int, new_tokens: int, *, is_shared: bool) -> list[Request]:
    """A system prompt of 1,000 tokens, the same for all users or (the cold case) one for each; questions differ."""
    chance = random.Random(seed)
    system = _words(chance, _SHARED_PROMPT_TOKENS)
    requests = []
    for request in fixed(seed + 1, num_users, new_tokens):
        prompt = system if is_shared else _words(chance, _SHARED_PROMPT_TOKENS)
        requests.append(replace(request, messages=(("system", prompt), *request.messages)))
    return requests


def poisson(seed: int, requests: Sequence[Request], per_s: float) -> list[Request]:
    """The same requests, arriving at random: `per_s` a second on average, whether or not earlier ones are answered."""
    chance = random.Random(seed)
    arrivals = _arrivals(chance, per_s)
    return [replace(request, arrival_s=next(arrivals)) for request in requests]


def _arrivals(chance: random.Random, per_s: float) -> Iterator[float]:
    now = 0.0
    while True:
        now += chance.expovariate(per_s)
        yield now


def _ask(chance: random.Random, prompt_tokens: int, new_tokens: int) -> Request:
    # Each message begins with a space, so that its first word is one token too.
    num_words = prompt_tokens - _TEMPLATE_TOKENS
    if num_words >= _FEWEST_WORDS:
        # The words come first, so that no block of tokens is the same in two prompts.
        return Request((("user", f" {_words(chance, num_words)} {_QUESTION}"),), new_tokens)
    system, *words = (f" {word}" for word in chance.choices(_WORDS, k=max(2, prompt_tokens - _SHORT_TEMPLATE_TOKENS)))
    return Request((("system", system), ("user", "".join(words))), new_tokens)


def _words(chance: random.Random, number: int) -> str:
    return " ".join(chance.choices(_WORDS, k=number))


def _log_normal(chance: random.Random, median: float, sigma: float, limits: tuple[int, int]) -> int:
    lowest, highest = limits
    return min(max(round(chance.lognormvariate(math.log(median), sigma)), lowest), highest)
