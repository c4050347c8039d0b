"""A gRPC server that answers as each test tells it to, and the two clients behind one blocking face."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from parley.v1 import chat_pb2, chat_pb2_grpc, generation_pb2, message_pb2
from parley_client import AsyncClient, AsyncStream, Client
from tests.support.batch_answers import answered, content

PATIENCE_S = 20  # how long a test waits for what must happen


class ScriptedServer(chat_pb2_grpc.ChatServiceServicer, health_pb2_grpc.HealthServicer):
    """Each RPC is answered by `script[its name]`, a function of (request, context)."""

    def __init__(self) -> None:
        self.script: dict[str, Callable[[Any, grpc.ServicerContext], Any]] = {}
        self.requests: list[Any] = []
        self.metadata: dict[str, Any] = {}
        self._ended = threading.Semaphore(0)
        self._held_in_vain = False
        self.port = 0

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _answer(self, name: str, request: Any, context: grpc.ServicerContext) -> Any:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        if not context.add_callback(self._ended.release):
            self._ended.release()
        return self.script[name](request, context)

    def Generate(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._answer("Generate", request, context)

    def GenerateStream(self, request: Any, context: grpc.ServicerContext) -> Any:
        yield from self._answer("GenerateStream", request, context)

    def GenerateBatch(self, request: Any, context: grpc.ServicerContext) -> Any:
        yield from self._answer("GenerateBatch", request, context)

    def CountTokens(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._answer("CountTokens", request, context)

    def GetModel(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._answer("GetModel", request, context)

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._answer("Check", request, context)

    def Watch(self, request: Any, context: grpc.ServicerContext) -> Any:
        yield from self._answer("Watch", request, context)

    def hold(self, context: grpc.ServicerContext) -> None:
        """Keeps the call open until the client ends it."""
        ended = threading.Event()
        if context.add_callback(ended.set) and not ended.wait(PATIENCE_S):
            self._held_in_vain = True

    def has_seen_the_end(self, num_calls: int = 1) -> bool:
        """Waits until so many calls, beyond those of earlier questions, have ended: answered, cancelled or expired."""
        ended = all(self._ended.acquire(timeout=PATIENCE_S) for _ in range(num_calls))
        return ended and not self._held_in_vain

    def says(self, *texts: str, **last: Any) -> None:
        """Answers every Generate and GenerateStream with these pieces of text, one token each."""
        usage = chat_pb2.Usage(prompt_tokens=7, completion_tokens=len(texts), cached_prompt_tokens=2)
        timings = chat_pb2.Timings(
            queue=Duration(nanos=1_000_000), time_to_first_token=Duration(nanos=20_000_000), total=Duration(seconds=1)
        )
        head = {"request_id": "request-1", "model": "scripted", "seed": 2**63}

        def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            for i, text in enumerate(texts):
                response = chat_pb2.GenerateStreamResponse(content=text, token_ids=[i], **(head if i == 0 else {}))
                if i == len(texts) - 1:
                    response.finish_reason = last.get("finish_reason", generation_pb2.FINISH_REASON_STOP)
                    response.usage.CopyFrom(usage)
                    response.timings.CopyFrom(timings)
                yield response

        def whole(request: Any, context: grpc.ServicerContext) -> Any:
            choice = chat_pb2.Choice(
                message=message_pb2.Message(role=message_pb2.ROLE_ASSISTANT, content="".join(texts)),
                finish_reason=last.get("finish_reason", generation_pb2.FINISH_REASON_STOP),
                token_ids=range(len(texts)),
            )
            return chat_pb2.GenerateResponse(choices=[choice], usage=usage, timings=timings, **head)

        self.script["Generate"] = whole
        self.script["GenerateStream"] = stream

    def fails(
        self,
        context: grpc.ServicerContext,
        code: grpc.StatusCode,
        reason: str,
        *,
        message: str = "as scripted",
        metadata: Mapping[str, str] | None = None,
        details: tuple[Any, ...] = (),
        domain: str = "parley.v1",
    ) -> None:
        """Ends the call with a status as the contract has it."""
        status = status_pb2.Status(code=code.value[0], message=message)
        info = error_details_pb2.ErrorInfo(domain=domain, reason=reason, metadata=metadata or {})
        for detail in (info, *details):
            status.details.add().Pack(detail)
        context.set_trailing_metadata(
            (("x-request-id", "request-1"), ("grpc-status-details-bin", status.SerializeToString()))
        )
        context.abort(code, message)

    def is_serving(self, status: int = health_pb2.HealthCheckResponse.SERVING) -> None:
        """Answers Check with this state."""
        self.script["Check"] = lambda request, context: health_pb2.HealthCheckResponse(status=status)


@contextmanager
def serving(address: str = "127.0.0.1:0") -> Iterator[ScriptedServer]:
    """A ScriptedServer at an address, by default at a free port."""
    scripted = ScriptedServer()
    with futures.ThreadPoolExecutor(max_workers=8) as pool:
        grpc_server = grpc.server(pool, options=[("grpc.max_receive_message_length", 1 << 20)])
        chat_pb2_grpc.add_ChatServiceServicer_to_server(scripted, grpc_server)
        health_pb2_grpc.add_HealthServicer_to_server(scripted, grpc_server)
        scripted.port = grpc_server.add_insecure_port(address)
        grpc_server.start()
        yield scripted
        grpc_server.stop(grace=None).wait(PATIENCE_S)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A ScriptedServer."""
    with serving() as scripted:
        yield scripted


@pytest.fixture
def server_is_default(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """`parley` asks the scripted server where no flag names another."""
    monkeypatch.setenv("PARLEY_TARGET", server.target)


class Blocking:
    """An AsyncClient with the face of a Client, so that one test body serves both."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._runner = asyncio.Runner()
        try:
            self._client = self._run(self._create(args, kwargs))
        except BaseException:
            self._runner.close()
            raise

    @staticmethod
    async def _create(args: Any, kwargs: Any) -> AsyncClient:
        return AsyncClient(*args, **kwargs)

    def _run(self, awaitable: Any) -> Any:
        async def run() -> Any:
            return await awaitable

        return self._runner.run(run())

    def __enter__(self) -> Blocking:
        return self

    def __exit__(self, *error: object) -> None:
        self._run(self._client.close())
        self._runner.close()

    def stream(self, *args: Any, **kwargs: Any) -> BlockingStream:
        async def create() -> AsyncStream:
            return self._client.stream(*args, **kwargs)

        return BlockingStream(self._run, self._run(create()))

    def generate_batch(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        results = self._client.generate_batch(*args, **kwargs)

        def read() -> Iterator[Any]:
            try:
                while True:
                    yield self._run(anext(results))
            except StopAsyncIteration:
                return
            finally:
                self._run(results.aclose())

        return read()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._run(getattr(self._client, name)(*args, **kwargs))


class BlockingStream:
    """An AsyncStream with the face of a Stream."""

    def __init__(self, run: Callable[[Any], Any], stream: AsyncStream) -> None:
        self._run = run
        self._stream = stream

    def __iter__(self) -> BlockingStream:
        return self

    def __next__(self) -> Any:
        try:
            return self._run(anext(self._stream))
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> BlockingStream:
        self._run(self._stream.__aenter__())
        return self

    def __exit__(self, *error: object) -> None:
        self._run(self._stream.__aexit__(None, None, None))

    def close(self) -> None:
        self._run(self._stream.close())

    def cancel(self) -> None:
        self._stream.cancel()

    @property
    def reply(self) -> Any:
        return self._stream.reply


@pytest.fixture(params=[Client, Blocking], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Makes a client: the blocking one, or the asyncio one behind the same face."""
    return request.param


@pytest.fixture
def client(connect: Callable[..., Any], server: ScriptedServer) -> Iterator[Any]:
    """A client of the scripted server."""
    with connect(server.target) as connected:
        yield connected


@pytest.fixture
def echoes(server):
    """Answers each item with its own last message."""

    def answer(request, context):
        for index, item in enumerate(request.requests):
            yield answered(index, content(item))

    server.script["GenerateBatch"] = answer
    return server
