"""One piece of a streamed answer."""

from __future__ import annotations

from parley.v1 import chat_pb2, message_pb2
from parley_client.logprobs import TokenLogprob
from parley_client.reply import FinishReason, Timings, Usage


class Piece:
    """What one message of a stream adds to one choice. `str(piece)` is its text; `proto` is the protobuf message."""

    def __init__(self, proto: chat_pb2.GenerateStreamResponse) -> None:
        self.proto = proto

    def __str__(self) -> str:
        return self.content

    def __repr__(self) -> str:
        return f"Piece(content={self.content!r}, token_ids={self.token_ids}, finish_reason={self.finish_reason!r})"

    @property
    def index(self) -> int:
        """The choice that the piece belongs to, from 0."""
        return self.proto.index

    @property
    def content(self) -> str:
        """Text to append; may be empty, as text follows its ids only when it is sure."""
        return self.proto.content

    @property
    def reasoning_content(self) -> str:
        """Reasoning text to append."""
        return self.proto.reasoning_content

    @property
    def tool_calls(self) -> list[message_pb2.ToolCallDelta]:
        """Pieces of tool calls; the stream's `reply.tool_calls` puts them together."""
        return list(self.proto.tool_calls)

    @property
    def token_ids(self) -> list[int]:
        """Ids generated since the choice's last piece."""
        return list(self.proto.token_ids)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """One for each of `token_ids`, if asked for."""
        return [TokenLogprob.from_proto(one) for one in self.proto.logprobs]

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the choice ended, on its last piece; else None."""
        return FinishReason.from_proto(self.proto.finish_reason)

    @property
    def stop_string(self) -> str:
        """On a choice's last piece: the stop string that ended it; empty if none did."""
        return self.proto.stop_string

    @property
    def usage(self) -> Usage | None:
        """Token counts, on the stream's last piece; else None."""
        return Usage.from_proto(self.proto.usage) if self.proto.HasField("usage") else None

    @property
    def timings(self) -> Timings | None:
        """Where the time went, on the stream's last piece; else None."""
        return Timings.from_proto(self.proto.timings) if self.proto.HasField("timings") else None
