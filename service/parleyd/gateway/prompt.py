"""Rendering and tokenizing prompts, long ones in threads of their own: they must not hold up the event loop."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from parley.v1 import chat_pb2
from parleyd.errors import InvalidRequest, PromptTooLong, Violation
from parleyd.gateway import tools
from parleyd.gateway.served_model import ServedModel
from parleyd.gateway.shared_threads import SharedThreads
from parleyd.telemetry.call import current_call

# Two, so that one huge prompt does not hold up all others; more would only take cores from the model.
_NUM_THREADS = 2
_LARGE_BYTES = 32 * 1024
# A prompt of this size takes less than a millisecond; handing it to a thread takes as long, or five times as long while
# the event loop is busy and holds the interpreter's lock.
_SMALL_BYTES = 2 * 1024
# Of messages and tool calls: short ones take as long as long ones.
_MAX_SMALL_PARTS = 256

_Request = TypeVar("_Request", chat_pb2.GenerateRequest, chat_pb2.CountTokensRequest)
_Result = TypeVar("_Result")


class Prompt(NamedTuple):
    """`opens_reasoning`: the answer begins amid the model's reasoning."""

    token_ids: list[int]
    opens_reasoning: bool


class PromptBuilder:
    """Makes prompt token ids out of conversations. Callers take turns: one large prompt of each at a time."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="prompt")
        self._threads = SharedThreads(self._executor)

    async def check(self, check: Callable[[_Request], _Result], request: _Request) -> _Result:
        """Runs a check of a request's fields: at once, unless the request is so large that it would take long."""
        must_call = isinstance(request, chat_pb2.GenerateRequest) and tools.is_required(request.tool_choice)
        # Of calls that must be made the check writes a grammar, for which it may render the conversation.
        if _is_small(request, _SMALL_BYTES if must_call else _LARGE_BYTES):
            return check(request)
        return await self.run(lambda: check(request))

    async def build(
        self, served: ServedModel, request: chat_pb2.GenerateRequest | chat_pb2.CountTokensRequest
    ) -> Prompt:
        """The conversation after the chat template.

        Raises InvalidRequest if the template refuses it, PromptTooLong if it leaves no room for an answer.
        """
        if _is_small(request, _SMALL_BYTES):
            return _build(served, request)
        return await self.run(lambda: _build(served, request))

    async def run(self, work: Callable[[], _Result]) -> _Result:
        """Runs other work on a prompt's ids or text that may take long."""
        return await self._threads.run(current_call.get().identity, work)

    def close(self) -> None:
        """Ends the threads."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def _is_small(request: chat_pb2.GenerateRequest | chat_pb2.CountTokensRequest, num_bytes: int) -> bool:
    num_messages = len(request.messages)
    if request.ByteSize() >= num_bytes or num_messages > _MAX_SMALL_PARTS:
        return False
    return num_messages + sum(len(message.tool_calls) for message in request.messages) <= _MAX_SMALL_PARTS


def _build(served: ServedModel, request: chat_pb2.GenerateRequest | chat_pb2.CountTokensRequest) -> Prompt:
    text, opens_reasoning = served.render(request)
    return Prompt(_tokenize(served, text), opens_reasoning)


def _tokenize(served: ServedModel, text: str) -> list[int]:
    spellings = served.spellings
    num_marks = 0 if spellings is None else spellings.count(text)
    encoding = served.tokenizer.encode(text)
    num_tokens = len(encoding) - num_marks
    if num_tokens >= served.info.max_context_tokens:
        raise PromptTooLong(num_tokens, served.info.max_context_tokens)
    token_ids = encoding.ids if spellings is None else spellings.without_marks(encoding.ids)
    # A tokenizer may know tokens that the model has no embedding for, and users may spell them.
    if token_ids and (highest := max(token_ids)) >= served.info.vocab_size:
        token = served.tokenizer.token(highest)
        why = f"become a prompt with the token {token!r}, which the tokenizer knows and the model has no embedding for"
        raise InvalidRequest([Violation("messages", why)])
    return token_ids
