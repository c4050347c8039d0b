"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack
from weakref import WeakSet

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from parley.v1 import chat_pb2, chat_pb2_grpc
from parley_client import request, status
from parley_client.accumulator import Accumulator
from parley_client.batch import BatchReader, BatchResult
from parley_client.channel import DEFAULT_MAX_RESUMES, DEFAULT_TARGET, CallDefaults, channel_options, check_target
from parley_client.credentials import ApiKey, channel_credentials
from parley_client.errors import Cancelled, ParleyError
from parley_client.health import RETRY_DELAY_S, HealthStatus, ReadinessWait
from parley_client.messages import AnyTool
from parley_client.model_info import ModelInfo
from parley_client.options import ChatOptions
from parley_client.patience import Patience
from parley_client.piece import Piece
from parley_client.reply import Reply
from parley_client.request import AnyMessage
from parley_client.resumption import Resumption


class AsyncClient:
    """As `Client`, for asyncio: the same arguments, methods, answers and errors.

    Make it and use it inside one running event loop (RuntimeError without one, and in another). Cancelling a task
    cancels the call it waits for.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        api_key: ApiKey | None = None,
        insecure: bool = False,
        metadata: Mapping[str, str] | None = None,
        max_attempts: int = 4,
        max_resumes: int = DEFAULT_MAX_RESUMES,
    ) -> None:
        check_target(target)
        self._loop = asyncio.get_running_loop()  # or RuntimeError: gRPC would take some loop, and calls fail in another
        options = channel_options(target, max_attempts)
        credentials = channel_credentials(target, credentials, api_key, insecure)
        self._defaults = CallDefaults.create(timeout, metadata, max_resumes, api_key if credentials is None else None)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, options)
        self._chat = chat_pb2_grpc.ChatServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._closed = asyncio.Event()
        self._calls: WeakSet[grpc.aio.Call] = WeakSet()
        self._streams: WeakSet[AsyncStream] = WeakSet()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection and every call on it."""
        self._closed.set()
        for call in list(self._calls):
            call.cancel()  # gRPC before 1.83 would leave some open
        await self._channel.close()
        for stream in self._streams:
            stream._awake.set()  # if it waits to be resumed, it finds the channel closed

    async def chat(
        self, messages: Iterable[AnyMessage], *, timeout: float | None = None, **options: Unpack[ChatOptions]
    ) -> Reply:
        """Answers a conversation and waits for the whole answer. As `Client.chat`."""
        return Reply(await self._call(self._chat.Generate, request.generate("chat", messages, options), timeout))

    def stream(
        self, messages: Iterable[AnyMessage], *, timeout: float | None = None, **options: Unpack[ChatOptions]
    ) -> AsyncStream:
        """Gives the answer as it is made: `async for piece in client.stream(...)`. As `Client.stream`."""
        message = request.generate("stream", messages, options)
        stream = AsyncStream(partial(self._begin, self._chat.GenerateStream), message, self._defaults.patience(timeout))
        self._streams.add(stream)
        return stream

    def generate_batch(
        self,
        requests: Iterable[Iterable[AnyMessage] | chat_pb2.GenerateRequest],
        *,
        timeout: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncGenerator[BatchResult]:
        """Answers up to 1,024 conversations in one call, each as it finishes. As `Client.generate_batch`.

        Python closes an `async for` that was left early only when it comes to it: `contextlib.aclosing` does at once.
        """
        return self._results(request.generate_batch(requests, options), self._defaults.args(timeout))

    async def _results(
        self, batch: chat_pb2.GenerateBatchRequest, args: Mapping[str, Any]
    ) -> AsyncGenerator[BatchResult]:
        reader = BatchReader(batch)
        call = self._begin(self._chat.GenerateBatch, batch, **args)
        try:
            with _typed_errors():
                async for response in call:
                    yield reader.read(status.readable(response))
        except ParleyError:
            if not reader.is_whole:
                raise
        finally:
            call.cancel()
        reader.check_ended()

    async def count_tokens(
        self,
        messages: Iterable[AnyMessage],
        *,
        model: str | None = None,
        tools: Sequence[AnyTool] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool | None = None,
        timeout: float | None = None,
    ) -> int:
        """Tokens of the conversation as the model would read it. As `Client.count_tokens`."""
        counted = request.count_tokens(messages, model, tools, chat_template_kwargs, continue_final_message)
        response: chat_pb2.CountTokensResponse = await self._call(self._chat.CountTokens, counted, timeout)
        return response.prompt_tokens

    async def model_info(self, model: str | None = None, *, timeout: float | None = None) -> ModelInfo:
        """What is served, its limits and its defaults."""
        return ModelInfo(await self._call(self._chat.GetModel, request.get_model(model), timeout))

    async def health(self, service: str = "", *, timeout: float | None = None) -> HealthStatus:
        """Whether the server takes calls, now. As `Client.health`."""
        check = health_pb2.HealthCheckRequest(service=service)
        try:
            response = await self._call_once(self._health.Check, check, self._defaults.args(timeout))
        except ParleyError as error:
            return HealthStatus.from_error(error)
        return HealthStatus.from_proto(response)

    async def wait_until_ready(self, timeout: float | None = None) -> None:
        """Waits until the server is there and its model is loaded. As `Client.wait_until_ready`."""
        wait = ReadinessWait(timeout)
        while not await self._watch_until_serving(wait):
            await self._pause(RETRY_DELAY_S)

    async def _watch_until_serving(self, wait: ReadinessWait) -> bool:
        call = self._begin(
            self._health.Watch,
            health_pb2.HealthCheckRequest(),
            timeout=wait.remaining_s(),
            metadata=self._defaults.metadata,
            wait_for_ready=True,
        )
        try:
            with _typed_errors():
                async for response in call:
                    if wait.saw(HealthStatus.from_proto(status.readable(response))):
                        return True
        except ParleyError as error:
            wait.saw_error(error)
        finally:
            call.cancel()
        return False

    async def _call(self, method: Any, message: object, timeout: float | None) -> Any:
        """As `Client._call`."""
        patience = self._defaults.patience(timeout)
        while True:
            try:
                response = await self._call_once(method, message, patience.call_args())
                patience.note_progress()
                return response
            except ParleyError as error:
                delay_s = patience.delay_before_again(error)
                if delay_s is None:
                    raise
            await self._pause(delay_s)

    async def _call_once(self, method: Any, message: object, args: Mapping[str, Any]) -> Any:
        with _typed_errors():
            return status.readable(await self._begin(method, message, **args))

    def _begin(self, method: Callable[..., Any], message: object, **args: Any) -> Any:
        """As `Client._begin`. Raises RuntimeError in another event loop than the client's."""
        if asyncio.get_running_loop() is not self._loop:  # gRPC's own errors would not say so
            raise RuntimeError("this client was made in another event loop: each loop, or asyncio.run, needs its own")
        try:
            call = method(message, **args)
        except grpc.aio.UsageError as error:
            raise Cancelled("the client was closed") from error
        self._calls.add(call)
        return call

    async def _pause(self, delay_s: float) -> None:
        if await _happens_within(delay_s, self._closed):
            raise Cancelled("the client was closed")


async def _happens_within(delay_s: float, event: asyncio.Event) -> bool:
    """Waits for an event at most so long. Not `wait_for`: that of Python 3.11 may drop a cancellation of the task."""
    with suppress(TimeoutError):
        async with asyncio.timeout(delay_s):
            await event.wait()
    return event.is_set()


@contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise status.from_rpc_error(error) from error
    except asyncio.CancelledError as error:
        if _is_about_this_task():
            raise
        raise Cancelled("the client was closed") from error


def _is_about_this_task() -> bool:
    """Whether a CancelledError means the running task. gRPC raises it too where only the call was cancelled, by
    `AsyncStream.cancel` or `AsyncClient.close`, and a task that nobody cancelled must not seem to be."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class AsyncStream(AsyncIterator[Piece]):
    """As `Stream`, for `async for`.

    Leaving the iteration early and dropping the stream, `cancel()`, leaving an `async with` block, or cancelling the
    task cancels the call, which frees the model.
    """

    def __init__(self, begin: Callable[..., Any], message: chat_pb2.GenerateRequest, patience: Patience) -> None:
        self._accumulator = Accumulator(message)
        self._resumption = Resumption(self._accumulator, patience)
        self._is_cancelled = False
        self._failure: ParleyError | None = None
        self._awake = asyncio.Event()  # as that of `Stream`
        self._begin = begin
        self._call_for(message, patience.call_args())

    def _call_for(self, message: chat_pb2.GenerateRequest, args: Mapping[str, Any]) -> None:
        self._call = self._begin(message, **args)
        # Not read(): that one answers "end" as soon as the status is there, with messages still waiting to be read.
        self._responses = aiter(self._call)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        """The next piece. Raises as `Stream.__next__`."""
        if self._failure is not None:
            raise self._failure  # gRPC's iterator tells it once, and then seems to have ended well
        try:
            while not self._is_cancelled:
                try:
                    piece = self._accumulator.add(status.readable(await anext(self._responses)))
                    self._resumption.note_progress()
                    return piece
                except StopAsyncIteration:
                    self._accumulator.check_ended()
                    raise
                except grpc.RpcError as error:
                    if self._accumulator.is_whole:
                        break
                    await self._resume(error)
        except ParleyError as error:
            self._call.cancel()
            self._failure = error
            raise
        except asyncio.CancelledError:
            self.cancel()
            if _is_about_this_task():
                raise
        self._accumulator.check_cancelled()
        raise StopAsyncIteration

    async def _resume(self, error: grpc.RpcError) -> None:
        """As `Stream._resume`."""
        try:
            delay_s = self._resumption.delay_after(status.from_rpc_error(error))
        except ParleyError as final:
            raise final from error
        await _happens_within(delay_s, self._awake)
        if self._is_cancelled:
            return
        self._call_for(self._resumption.request(), self._resumption.call_args())

    @property
    def reply(self) -> Reply:
        """The answer so far; the whole one once the iteration is over. A new Reply each time."""
        return self._accumulator.reply

    def cancel(self) -> None:
        """Ends the call. What has arrived stays in `reply`."""
        self._is_cancelled = True
        self._awake.set()
        self._call.cancel()

    async def close(self) -> None:
        """As `cancel`."""
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        # The call and its iterator refer to each other, so gRPC's own clean-up would wait for the garbage collector.
        if hasattr(self, "_call") and not self._call.done():
            self._call.cancel()
