"""Log-probabilities as clients see them: the engine's numbers, with the text and bytes of their tokens."""

from __future__ import annotations

from typing import Any

from parley.v1 import generation_pb2
from parleyd.generation import TokenLogprob
from parleyd.text.tokenizer import Tokenizer


def to_token_logprob(tokenizer: Tokenizer, token_id: int, logprob: TokenLogprob) -> generation_pb2.TokenLogprob:
    """The contract's message for a generated id."""
    return generation_pb2.TokenLogprob(
        **_fields(tokenizer, token_id, logprob.logprob),
        top=[generation_pb2.TopLogprob(**_fields(tokenizer, *top)) for top in logprob.top],
    )


def _fields(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    token_bytes = tokenizer.token_bytes(token_id)
    token = token_bytes.decode(errors="replace")
    return {"token_id": token_id, "token": token, "bytes": token_bytes, "logprob": logprob}
