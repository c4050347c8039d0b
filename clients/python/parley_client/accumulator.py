"""Puts the messages of a stream together to the reply that a unary call would have given."""

from __future__ import annotations

from dataclasses import dataclass, field

from parley.v1 import chat_pb2, generation_pb2, message_pb2
from parley_client.errors import Cancelled, IncompleteStream
from parley_client.piece import Piece
from parley_client.reply import Reply


@dataclass
class _ChoiceParts:
    """One choice so far. Text is kept in parts: appending to a string field copies it whole, for each token again."""

    content: list[str] = field(default_factory=list)
    reasoning_content: list[str] = field(default_factory=list)
    tool_calls: dict[int, message_pb2.ToolCall] = field(default_factory=dict)
    # Ids, logprobs, finish reason and stop string.
    rest: chat_pb2.Choice = field(default_factory=chat_pb2.Choice)

    def add(self, response: chat_pb2.GenerateStreamResponse) -> None:
        self.content.append(response.content)
        self.reasoning_content.append(response.reasoning_content)
        for delta in response.tool_calls:
            call = self.tool_calls.setdefault(delta.index, message_pb2.ToolCall())
            call.id = call.id or delta.id
            call.name = call.name or delta.name
            call.arguments += delta.arguments
        self.rest.token_ids.extend(response.token_ids)
        self.rest.logprobs.extend(response.logprobs)
        self.rest.finish_reason = response.finish_reason or self.rest.finish_reason
        self.rest.stop_string = response.stop_string or self.rest.stop_string

    def to_choice(self, index: int) -> chat_pb2.Choice:
        choice = chat_pb2.Choice()
        choice.CopyFrom(self.rest)
        choice.index = index
        choice.message.role = message_pb2.ROLE_ASSISTANT
        choice.message.content = "".join(self.content)
        choice.message.reasoning_content = "".join(self.reasoning_content)
        choice.message.tool_calls.extend(self.tool_calls[i] for i in sorted(self.tool_calls))
        return choice


class Accumulator:
    """The answer to `request`, as far as it has come."""

    def __init__(self, request: chat_pb2.GenerateRequest) -> None:
        self._request = request
        # If the request leaves the number to the model's defaults, the choices that show up have to do.
        self._num_choices = request.generation_config.num_return_sequences or 1
        self._choices: dict[int, _ChoiceParts] = {}
        self._head = chat_pb2.GenerateResponse()

    def add(self, response: chat_pb2.GenerateStreamResponse) -> Piece:
        """Takes in the stream's next message.

        Those of a resumed stream tell once more what its first message told: the piece does not.
        """
        if self._head.request_id:
            for name in ("request_id", "model", "seed"):
                response.ClearField(name)
        elif response.request_id:
            self._head.request_id = response.request_id
            self._head.model = response.model
            self._head.seed = response.seed
        if response.HasField("usage"):
            self._head.usage.CopyFrom(response.usage)
        if response.HasField("timings"):
            self._head.timings.CopyFrom(response.timings)
        self._choices.setdefault(response.index, _ChoiceParts()).add(response)
        return Piece(response)

    @property
    def reply(self) -> Reply:
        """The answer so far: a new Reply each time."""
        proto = chat_pb2.GenerateResponse()
        proto.CopyFrom(self._head)
        proto.choices.extend(self._choices[index].to_choice(index) for index in sorted(self._choices))
        return Reply(proto)

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        unfinished = generation_pb2.FINISH_REASON_UNSPECIFIED
        return all(index in self._choices for index in range(self._num_choices)) and all(
            choice.rest.finish_reason != unfinished for choice in self._choices.values()
        )

    @property
    def is_whole(self) -> bool:
        """Whether the stream's very last message is here; however the call ends then, nothing is missing."""
        return self.complete and self._head.HasField("usage")

    @property
    def has_begun(self) -> bool:
        """Whether a part of the answer is here."""
        return bool(self._head.request_id)

    @property
    def can_resume(self) -> bool:
        """Whether a server can go on from what is here: it has begun, and is not one of several answers."""
        return self.has_begun and max(self._num_choices, len(self._choices)) == 1

    def remainder(self) -> chat_pb2.GenerateRequest:
        """The request for the rest of the answer, which any server of the same model can answer."""
        request = chat_pb2.GenerateRequest()
        request.CopyFrom(self._request)
        if not self.has_begun:
            return request
        request.request_id, request.model = self._head.request_id, self._head.model
        request.generation_config.seed = self._head.seed
        for choice in self._choices.values():
            request.resume.token_ids.extend(choice.rest.token_ids)
        return request

    def check_ended(self) -> None:
        """To be called when the stream has ended well.

        Raises:
            IncompleteStream: a choice has not ended.
        """
        if not self.complete:
            raise IncompleteStream(
                "the stream ended without a finish reason: the answer is incomplete", request_id=self._request_id
            )

    def check_cancelled(self) -> None:
        """To be called when someone goes on to iterate over a cancelled stream.

        Raises:
            Cancelled: a choice had not ended.
        """
        if not self.complete:
            raise Cancelled("the stream was cancelled", request_id=self._request_id)

    @property
    def _request_id(self) -> str | None:
        return self._head.request_id or None
