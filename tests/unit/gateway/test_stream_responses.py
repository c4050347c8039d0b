"""A stream's messages: one that is filled again and again, and never shows what it held before."""

from __future__ import annotations

from parley.v1 import generation_pb2
from parleyd.gateway.answer import AnswerDelta
from parleyd.gateway.stream_responses import StreamResponses
from parleyd.generation import FinishReason
from parleyd.text.parsed_text import ParsedText
from parleyd.text.tool_format.tool_format import ToolCallPiece

FULL = AnswerDelta(
    index=3,
    token_ids=[1, 2],
    logprobs=[generation_pb2.TokenLogprob(token_id=1)],
    text=ParsedText("content", "reasoning", [ToolCallPiece(0, "id", "name", "{}")]),
    finish_reason=FinishReason.STOP,
    stop_string="end",
)
PLAIN = AnswerDelta(token_ids=[5], text=ParsedText("plain"))


def test_nothing_is_left_of_the_delta_before() -> None:
    responses = StreamResponses()
    full = responses.make(FULL).SerializeToString()
    plain = responses.make(PLAIN).SerializeToString()
    assert plain == StreamResponses().make(PLAIN).SerializeToString()
    assert responses.make(FULL).SerializeToString() == full
    assert len(full) > len(plain) > 0


def test_few_messages_serve_a_stream() -> None:
    """Not one for all: what a message has held stays with it."""
    responses = StreamResponses()
    kept = [responses.make(PLAIN) for _ in range(1000)]
    assert 1 < len({id(message) for message in kept}) < 50
