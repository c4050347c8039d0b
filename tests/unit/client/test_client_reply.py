"""What replies and pieces make of odd answers."""

from __future__ import annotations

from parley.v1 import chat_pb2, generation_pb2
from parley_client import FinishReason, Piece, Reply


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
