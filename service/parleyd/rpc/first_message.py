"""Reads the messages of calls, which may be no messages of their type, or the one of a call not be there at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

# The reading of a call that is cancelled ends as if there were no message; a moment later the call learns the truth.
_UNTIL_CANCELLED_S = 0.05

NO_MESSAGE = "no message of this type arrived"

Context = grpc.aio.ServicerContext[Any, Any]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]
Behaviour = Callable[[Any, Context], Awaitable[Any]]


class Undecodable:
    """Stands in for a request whose bytes are no message, or are not there, so that the answer is ours: gRPC logs a
    stack for the first, and leaves the second without any."""


class FirstMessageInterceptor(grpc.aio.ServerInterceptor):
    """Goes around all others. To gRPC every call is a stream of messages, as only such get to know that none came."""

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler: Any = await continuation(details)
        if handler is None or handler.request_deserializer is None:  # then it refuses, whatever comes
            return handler
        streaming = handler._replace(
            request_streaming=True, request_deserializer=_tolerant(handler.request_deserializer)
        )
        if handler.request_streaming:  # of reflection alone, which answers in a stream too
            return streaming._replace(stream_stream=_with_messages(handler.stream_stream))
        if handler.response_streaming:
            return streaming._replace(unary_stream=None, stream_stream=_with_message(handler.unary_stream))
        return streaming._replace(unary_unary=None, stream_unary=_with_message(handler.unary_unary))


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decode(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return Undecodable()

    return decode


def _with_messages(behaviour: Callable[[Any, Context], AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    async def decodable(requests: Any, context: Context) -> AsyncIterator[Any]:
        async for request in requests:
            if isinstance(request, Undecodable):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_MESSAGE)
            yield request

    async def handle(requests: Any, context: Context) -> AsyncIterator[Any]:
        with _aborts_forgotten():
            async for response in behaviour(decodable(requests, context), context):
                yield response

    return handle


def _with_message(behaviour: Behaviour) -> Behaviour:
    async def handle(requests: Any, context: Context) -> Any:
        request = await context.read()
        if request is grpc.aio.EOF:
            await asyncio.sleep(_UNTIL_CANCELLED_S)
            request = Undecodable()
        with _aborts_forgotten():
            return await behaviour(request, context)

    return handle


@contextmanager
def _aborts_forgotten() -> Iterator[None]:
    """Ends what was aborted as gRPC allows, by a return. It keeps the exception with the call, whose request would then
    hang on the traceback, in a circle: there until garbage is collected, however large."""
    try:
        yield
    except grpc.aio.AbortError as aborted:
        aborted.__traceback__ = aborted.__context__ = None
