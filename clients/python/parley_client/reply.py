"""A whole answer, as `chat` returns it and a stream accumulates it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from google.protobuf import duration_pb2

from parley.v1 import chat_pb2, generation_pb2
from parley_client.logprobs import TokenLogprob
from parley_client.messages import Message, Role, ToolCall


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "STOP"  # the model ended it, or a stop string or stop id did
    LENGTH = "LENGTH"  # max_new_tokens or the end of the context cut it off
    TOOL_CALLS = "TOOL_CALLS"  # the model called tools and waits for their results
    UNKNOWN = "UNKNOWN"  # a reason newer than this client; `proto` holds its number

    @classmethod
    def from_proto(cls, value: int) -> FinishReason | None:
        """The reason for a value of `parley.v1.FinishReason`; None for "not ended yet"."""
        if value == generation_pb2.FINISH_REASON_UNSPECIFIED:
            return None
        value_descriptor = generation_pb2.FinishReason.DESCRIPTOR.values_by_number.get(value)
        short_name = value_descriptor.name.removeprefix("FINISH_REASON_") if value_descriptor else "UNKNOWN"
        return cls(short_name) if short_name in cls.__members__ else cls.UNKNOWN


@dataclass(frozen=True)
class Usage:
    """Token counts of one request; `completion_tokens` is summed over the choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int

    @classmethod
    def from_proto(cls, proto: chat_pb2.Usage) -> Usage:
        """The counts of a protobuf message."""
        return cls(proto.prompt_tokens, proto.completion_tokens, proto.cached_prompt_tokens)


@dataclass(frozen=True)
class Timings:
    """Where the time went, in seconds from the request's arrival at the server."""

    queue_s: float
    time_to_first_token_s: float
    total_s: float

    @classmethod
    def from_proto(cls, proto: chat_pb2.Timings) -> Timings:
        """The times of a protobuf message."""
        return cls(_seconds(proto.queue), _seconds(proto.time_to_first_token), _seconds(proto.total))


class Choice:
    """One of the answers; `proto` is the protobuf message."""

    def __init__(self, proto: chat_pb2.Choice) -> None:
        self.proto = proto

    @property
    def index(self) -> int:
        """Position among the choices, from 0."""
        return self.proto.index

    @property
    def content(self) -> str:
        """The text."""
        return self.proto.message.content

    @property
    def reasoning_content(self) -> str:
        """What the model thought before it answered; empty for models that do not."""
        return self.proto.message.reasoning_content

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Tools that the model called."""
        return tuple(ToolCall(call.id, call.name, call.arguments) for call in self.proto.message.tool_calls)

    @property
    def message(self) -> Message:
        """The answer as a message of the conversation."""
        return Message(Role.ASSISTANT, self.content, self.reasoning_content, self.tool_calls)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer ended; None while it is still being streamed, or if it broke off."""
        return FinishReason.from_proto(self.proto.finish_reason)

    @property
    def stop_string(self) -> str:
        """The stop string that ended the answer; empty if none did."""
        return self.proto.stop_string

    @property
    def token_ids(self) -> list[int]:
        """Every generated id, the end token's included."""
        return list(self.proto.token_ids)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """One for each of `token_ids`, if asked for."""
        return [TokenLogprob.from_proto(one) for one in self.proto.logprobs]


class Reply:
    """An answer. May stand among the messages of the next call, as its first choice's message.

    `content`, `message`, `tool_calls` and so on are those of the first choice; `choices` has all of them
    (`num_return_sequences`). `str(reply)` is `content`; `proto` is the protobuf message.
    """

    def __init__(self, proto: chat_pb2.GenerateResponse) -> None:
        self.proto = proto
        # A server always answers at least one; an answer without any then reads as empty and unfinished.
        self.choices = tuple(Choice(choice) for choice in proto.choices or [chat_pb2.Choice()])

    def __str__(self) -> str:
        return self.content

    def __repr__(self) -> str:
        return f"Reply(content={self.content!r}, finish_reason={self.finish_reason!r}, request_id={self.request_id!r})"

    @property
    def content(self) -> str:
        """The text."""
        return self.choices[0].content

    @property
    def reasoning_content(self) -> str:
        """What the model thought before it answered; empty for models that do not."""
        return self.choices[0].reasoning_content

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Tools that the model called."""
        return self.choices[0].tool_calls

    @property
    def message(self) -> Message:
        """The answer as a message of the conversation."""
        return self.choices[0].message

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer ended; None while it is still being streamed, or if it broke off."""
        return self.choices[0].finish_reason

    @property
    def stop_string(self) -> str:
        """The stop string that ended the answer; empty if none did."""
        return self.choices[0].stop_string

    @property
    def token_ids(self) -> list[int]:
        """Every generated id, the end token's included."""
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """One for each of `token_ids`, if asked for."""
        return self.choices[0].logprobs

    @property
    def request_id(self) -> str:
        """The request's id, as in the server's log."""
        return self.proto.request_id

    @property
    def model(self) -> str:
        """The served name of the model that answered."""
        return self.proto.model

    @property
    def seed(self) -> int:
        """The seed used: the same request with it draws the same tokens."""
        return self.proto.seed

    @property
    def usage(self) -> Usage | None:
        """Token counts; None until a stream has ended."""
        return Usage.from_proto(self.proto.usage) if self.proto.HasField("usage") else None

    @property
    def timings(self) -> Timings | None:
        """Where the time went; None until a stream has ended."""
        return Timings.from_proto(self.proto.timings) if self.proto.HasField("timings") else None


def _seconds(duration: duration_pb2.Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
