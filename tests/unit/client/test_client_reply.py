"""What replies and pieces make of odd answers."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from parley.v1 import chat_pb2, generation_pb2, message_pb2
from parley_client import FinishReason, Piece, Reply, Timings, TokenLogprob, ToolCall


def test_every_finish_reason_of_the_contract_has_a_name():
    for name, value in generation_pb2.FinishReason.items():
        short_name = name.removeprefix("FINISH_REASON_")
        expected = None if short_name == "UNSPECIFIED" else FinishReason[short_name]
        assert FinishReason.from_proto(value) is expected


def test_a_finish_reason_newer_than_this_client_still_ends_the_answer():
    assert Piece(chat_pb2.GenerateStreamResponse(finish_reason=99)).finish_reason is FinishReason.UNKNOWN


def test_an_answer_without_choices_reads_as_empty_and_unfinished():
    reply = Reply(chat_pb2.GenerateResponse())
    assert (reply.content, reply.finish_reason, reply.usage, reply.timings) == ("", None, None, None)


LOGPROB = generation_pb2.TokenLogprob(token_id=7, token="a", bytes=b"a", logprob=-0.5)


def test_a_piece_tells_all_that_its_message_does():
    call = message_pb2.ToolCallDelta(id="c1", name="f", arguments="{")
    proto = chat_pb2.GenerateStreamResponse(
        index=2, reasoning_content="hm", tool_calls=[call], logprobs=[LOGPROB], stop_string="."
    )
    proto.timings.total.CopyFrom(Duration(seconds=1, nanos=500_000_000))
    piece = Piece(proto)
    assert (piece.index, piece.reasoning_content, piece.tool_calls, piece.stop_string) == (2, "hm", [call], ".")
    assert piece.logprobs == [TokenLogprob.from_proto(LOGPROB)]
    assert piece.timings == Timings(0.0, 0.0, 1.5)


def test_a_reply_tells_what_its_first_choice_does():
    first = chat_pb2.Choice(logprobs=[LOGPROB], token_ids=[7], stop_string=".")
    first.message.reasoning_content = "hm"
    first.message.tool_calls.add(id="c1", name="f", arguments="{}")
    reply = Reply(chat_pb2.GenerateResponse(choices=[first, chat_pb2.Choice(stop_string="!")]))
    assert (reply.reasoning_content, reply.stop_string, reply.token_ids) == ("hm", ".", [7])
    assert reply.tool_calls == (ToolCall("c1", "f", "{}"),) == reply.message.tool_calls
    assert reply.logprobs == [TokenLogprob.from_proto(LOGPROB)]
