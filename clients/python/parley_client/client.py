"""The blocking client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
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

# With grpcio a blocking stream whose server dies before its first message would never end, not at its deadline either,
# once gRPC's own tries are used up (seen from 1.71 to 1.85): those of streams are made here.
_RETRIED_BY_GRPC = ("Generate", "CountTokens", "GetModel")


class Client:
    """A connection to a Parley server; threads may share it. Close it, or use it as a context manager.

    Args:
        target: where the server listens, "HOST:PORT" or any other gRPC target. Calls take turns among the addresses of
            a target that has several, such as "ipv4:10.0.0.1:50051,10.0.0.2:50051" or "dns:///parley.internal:50051".
        timeout: seconds that each call may take, unless the call says otherwise; None is no limit.
        credentials: channel credentials, such as `tls_credentials()`; None connects in plain text.
        api_key: what each call shows the server, an API key or a JSON Web Token; a function is asked before each call.
        insecure: let the key cross a network in plain text, where something else protects it. Without, a key needs
            `credentials` or a server on this machine.
        metadata: metadata for each call.
        max_attempts: how often a call is tried while no server answers it, 1 (no retry) to 5. Only until the first part
            of the answer arrives, so nothing is ever seen twice.
        max_resumes: how often in a row, over some 16 s, a call that ends `Unavailable` even so is made again before its
            error is raised; 0 is never. On the way a full queue is waited for too. A stream that broke is taken up
            where it broke, by this server or another of the same target: its pieces are those of an unbroken one. Not
            where no server of the target has ever answered; not streams of several answers (`num_return_sequences`)
            that have begun; not `generate_batch`.

    The connection is made with the first call. Every call raises a subclass of `ParleyError` when it fails.
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
        options = channel_options(target, max_attempts, _RETRIED_BY_GRPC)
        self._num_retries = max_attempts - 1  # of streams
        credentials = channel_credentials(target, credentials, api_key, insecure)
        self._defaults = CallDefaults.create(timeout, metadata, max_resumes, api_key if credentials is None else None)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, credentials, options)
        self._chat = chat_pb2_grpc.ChatServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._closed = threading.Event()
        self._streams: WeakSet[Stream] = WeakSet()
        self._streams_lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection and every call on it."""
        self._closed.set()
        self._channel.close()
        with self._streams_lock:
            streams = list(self._streams)
        for stream in streams:
            stream._awake.set()  # if it waits to be resumed, it finds the channel closed

    def chat(
        self, messages: Iterable[AnyMessage], *, timeout: float | None = None, **options: Unpack[ChatOptions]
    ) -> Reply:
        """Answers a conversation and waits for the whole answer.

        Args:
            messages: the conversation, oldest first; earlier replies may stand in it as they are.
            timeout: seconds that queueing and generation may take; None is the client's own, `math.inf` no limit.
            **options: see `ChatOptions`.

        Raises:
            ParleyError: InvalidRequest, PromptTooLong, ModelNotFound, QueueFull, DeadlineExceeded, NotReady, Draining,
                WorkerLost, Unsupported, ConnectionFailed, …
            TypeError: an option that does not exist, or something that is no message.
        """
        return Reply(self._call(self._chat.Generate, request.generate("chat", messages, options), timeout))

    def stream(
        self, messages: Iterable[AnyMessage], *, timeout: float | None = None, **options: Unpack[ChatOptions]
    ) -> Stream:
        """As `chat`, but gives the answer as it is made: `for piece in client.stream(...)`.

        The call starts at once; what `chat` raises, the iteration raises (except for requests that cannot be built, and
        where the client was closed, or has no key to show with `insecure`).
        """
        message = request.generate("stream", messages, options)
        patience = self._defaults.patience(timeout, self._num_retries)
        stream = Stream(partial(self._begin, self._chat.GenerateStream), message, patience)
        with self._streams_lock:
            self._streams.add(stream)
        if self._closed.is_set():  # in the meantime, by another thread
            stream._awake.set()
        return stream

    def generate_batch(
        self,
        requests: Iterable[Iterable[AnyMessage] | chat_pb2.GenerateRequest],
        *,
        timeout: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> Generator[BatchResult]:
        """Answers up to 1,024 conversations in one call: `for result in client.generate_batch(...)`, as they finish.

        An item that fails does so alone: `result.error`. Leaving the loop early cancels the call and frees the model.

        Args:
            requests: conversations, or requests with options of their own, which `chat_request` builds.
            timeout: seconds that the whole batch may take; None is the client's own.
            **options: for the conversations, see `ChatOptions`.

        Raises:
            ParleyError: the call as a whole failed; what finished before has been told by then. IncompleteStream if it
                ended with items left over.
        """
        return self._results(request.generate_batch(requests, options), timeout, self._defaults.args(timeout))

    def _results(
        self, batch: chat_pb2.GenerateBatchRequest, timeout: float | None, args: Mapping[str, Any]
    ) -> Generator[BatchResult]:
        reader = BatchReader(batch)
        patience = self._defaults.patience(timeout, self._num_retries, is_resumed=False)
        while True:
            call = self._begin(self._chat.GenerateBatch, batch, **args)
            try:
                for response in call:
                    yield reader.read(response)
                break
            except grpc.RpcError as error:
                if reader.is_whole:
                    return
                failed = status.from_rpc_error(error)
                delay_s = None if reader.has_begun else patience.delay_before_again(failed)
                if delay_s is None:
                    raise failed from error
            finally:
                call.cancel()
            self._pause(delay_s)
            args = patience.call_args()
        reader.check_ended()

    def count_tokens(
        self,
        messages: Iterable[AnyMessage],
        *,
        model: str | None = None,
        tools: Sequence[AnyTool] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool | None = None,
        timeout: float | None = None,
    ) -> int:
        """Tokens of the conversation as the model would read it, after the chat template. Counts over-long ones too."""
        counted = request.count_tokens(messages, model, tools, chat_template_kwargs, continue_final_message)
        response: chat_pb2.CountTokensResponse = self._call(self._chat.CountTokens, counted, timeout)
        return response.prompt_tokens

    def model_info(self, model: str | None = None, *, timeout: float | None = None) -> ModelInfo:
        """What is served, its limits and its defaults."""
        return ModelInfo(self._call(self._chat.GetModel, request.get_model(model), timeout))

    def health(self, service: str = "", *, timeout: float | None = None) -> HealthStatus:
        """Whether the server takes calls, now. `service`: "" is the server as a whole."""
        check = health_pb2.HealthCheckRequest(service=service)
        try:
            response = self._call_once(self._health.Check, check, self._defaults.args(timeout))
        except ParleyError as error:
            return HealthStatus.from_error(error)
        return HealthStatus.from_proto(response)

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Waits until the server is there and its model is loaded, at most `timeout` seconds (None: for ever).

        Raises:
            DeadlineExceeded: it is not, after that time.
            Cancelled: the client was closed.
            Unimplemented: the server has no health service.
        """
        wait = ReadinessWait(timeout)
        while not self._watch_until_serving(wait):
            self._pause(RETRY_DELAY_S)

    def _watch_until_serving(self, wait: ReadinessWait) -> bool:
        call = self._begin(
            self._health.Watch,
            health_pb2.HealthCheckRequest(),
            timeout=wait.remaining_s(),
            metadata=self._defaults.metadata,
            wait_for_ready=True,
        )
        try:
            return any(wait.saw(HealthStatus.from_proto(response)) for response in call)
        except grpc.RpcError as error:
            wait.saw_error(status.from_rpc_error(error))
            return False
        finally:
            call.cancel()

    def _call(self, method: Any, message: object, timeout: float | None) -> Any:
        """A unary call, made again where that may help: nothing of its answer has been seen yet."""
        patience = self._defaults.patience(timeout)
        while True:
            try:
                response = self._call_once(method, message, patience.call_args())
                patience.note_progress()
                return response
            except ParleyError as error:
                delay_s = patience.delay_before_again(error)
                if delay_s is None:
                    raise
            self._pause(delay_s)

    def _pause(self, delay_s: float) -> None:
        if self._closed.wait(delay_s):
            raise Cancelled("the client was closed")

    def _call_once(self, method: Any, message: object, args: Mapping[str, Any]) -> Any:
        future = self._begin(method.future, message, **args)
        try:
            return status.readable(future.result())
        except grpc.RpcError as error:
            raise status.from_rpc_error(error) from error
        finally:
            # Ctrl-C ends the waiting, and this the call. A no-op for calls that have ended.
            future.cancel()

    def _begin(self, method: Callable[..., Any], message: object, **args: Any) -> Any:
        """Calls a gRPC method: any call of the client begins here. Raises Cancelled if the client was closed."""
        try:
            return method(message, **args)
        except ValueError as error:  # what gRPC raises for a closed channel
            if not self._closed.is_set():
                raise
            raise Cancelled("the client was closed") from error


class Stream(Iterator[Piece]):
    """An answer being made: iterate over its pieces.

    Leaving the iteration early and dropping the stream, Ctrl-C while it waits, `cancel()`, or leaving a `with` block
    cancels the call, which frees the model. Only the iteration itself must stay in one thread.

    A program that goes on after Ctrl-C, such as a notebook, better iterates in another thread than the main one:
    KeyboardInterrupt within gRPC can leave a lock held that every later call of the client waits for.
    """

    def __init__(self, begin: Callable[..., Any], message: chat_pb2.GenerateRequest, patience: Patience) -> None:
        self._accumulator = Accumulator(message)
        self._resumption = Resumption(self._accumulator, patience)
        self._is_cancelled = False
        self._failure: ParleyError | None = None
        self._awake = threading.Event()  # set where it is cancelled, or its client closed: nothing is waited for then
        self._begin = begin
        self._call = begin(message, **patience.call_args())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        """The next piece.

        Raises:
            ParleyError: the call failed; IncompleteStream if it ended without a finish reason; Cancelled after
                `cancel`, unless the answer was complete by then.
        """
        while not self._is_cancelled:
            try:
                piece = self._accumulator.add(next(self._call))
                self._resumption.note_progress()
                return piece
            except StopIteration:
                self._accumulator.check_ended()
                raise
            except grpc.RpcError as error:
                if self._accumulator.is_whole:
                    break
                self._resume(error)
            except BaseException:
                self.cancel()
                raise
        if self._failure is not None:
            raise self._failure
        self._accumulator.check_cancelled()
        raise StopIteration

    def _resume(self, error: grpc.RpcError) -> None:
        """Takes the answer up again after a while. Raises the typed error where that would not help."""
        try:
            delay_s = self._resumption.delay_after(status.from_rpc_error(error))
        except ParleyError as final:
            raise final from error
        try:
            self._awake.wait(delay_s)
            if self._is_cancelled:
                return
            self._call = self._begin(self._resumption.request(), **self._resumption.call_args())
        except BaseException as failure:
            self._failure = failure if isinstance(failure, ParleyError) else None
            self.cancel()
            raise
        if self._is_cancelled:  # in the meantime, by another thread
            self._call.cancel()

    @property
    def reply(self) -> Reply:
        """The answer so far; the whole one once the iteration is over. A new Reply each time."""
        return self._accumulator.reply

    def cancel(self) -> None:
        """Ends the call, from any thread. What has arrived stays in `reply`."""
        self._is_cancelled = True
        self._awake.set()
        self._call.cancel()

    close = cancel

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.cancel()

    def __del__(self) -> None:
        # Without a call (it could not begin) there is nothing to end.
        if hasattr(self, "_call"):
            self._call.cancel()
