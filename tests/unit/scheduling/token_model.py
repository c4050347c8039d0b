"""The model: a token's key and value stand for all tokens up to it, and decide the next."""

from __future__ import annotations

from parleyd.generation import FinishReason
from tests.support.scheduling import Request

VOCAB_SIZE, EOS = 13, 0
CONTEXT = 40


def key_value(before: int, token_id: int) -> int:
    return (before * 1_000_003 + token_id + 1) % (2**61 - 1)


def before_the_first(salt: str) -> int:
    """Tenants with different salts have different models, so that sharing between them would show."""
    return sum(salt.encode())


def next_token(last_key_value: int) -> int:
    return last_key_value % VOCAB_SIZE


def answer(request: Request) -> tuple[list[int], FinishReason]:
    """The reference: one request alone, without a cache."""
    state = before_the_first(request.cache_salt)
    for token_id in request.prompt_ids + request.output_ids:
        state = key_value(state, token_id)
    stop_ids = {*request.params.stop_token_ids, *(() if request.params.ignore_eos else (EOS,))}
    output = list(request.output_ids)
    room = min(request.params.max_new_tokens, CONTEXT - len(request.prompt_ids))
    if stop_ids.intersection(output):
        return [], FinishReason.STOP
    while len(output) < room:
        output.append(next_token(state))
        state = key_value(state, output[-1])
        if output[-1] in stop_ids:
            return output[len(request.output_ids) :], FinishReason.STOP
    return output[len(request.output_ids) :], FinishReason.LENGTH
