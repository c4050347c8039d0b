"""Every error class over the wire, through the one table."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest

from parley.v1 import chat_pb2, chat_pb2_grpc, errors_pb2
from parleyd import errors
from parleyd.config import SecuritySettings
from parleyd.errors import ParleyError, Reason
from parleyd.rpc.interceptors import CallInterceptor
from parleyd.rpc.status import CODES
from parleyd.security.guard import Guard
from tests.support.errors import EXAMPLES
from tests.support.requests import ask, error_info_of, reason_of, retry_delay_of, violated_fields

OPEN = Guard(SecuritySettings(), ["Generate"])


def all_subclasses(base: type[ParleyError]) -> Iterator[type[ParleyError]]:
    for subclass in base.__subclasses__():
        yield subclass
        yield from all_subclasses(subclass)


class Raising(chat_pb2_grpc.ChatServiceServicer):
    """Raises what it is told to."""

    error: BaseException

    async def Generate(self, request: Any, context: Any) -> Any:
        raise self.error

    async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield chat_pb2.GenerateStreamResponse(content="first")
        raise self.error


@pytest.fixture
async def service() -> AsyncIterator[tuple[Raising, chat_pb2_grpc.ChatServiceStub]]:
    raising = Raising()
    server = grpc.aio.server(
        interceptors=[CallInterceptor("parley.v1.ChatService", OPEN, lambda *_: None, lambda *_: None, lambda _: b"")]
    )
    chat_pb2_grpc.add_ChatServiceServicer_to_server(raising, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield raising, chat_pb2_grpc.ChatServiceStub(channel)
    await server.stop(None)


def test_there_is_an_example_of_every_error() -> None:
    assert set(EXAMPLES) == set(all_subclasses(ParleyError))


def test_every_reason_has_a_code_and_is_in_the_contract() -> None:
    assert set(CODES) == set(Reason)
    assert {f"ERROR_REASON_{reason.value}" for reason in Reason} <= set(errors_pb2.ErrorReason.keys())


@pytest.mark.parametrize("error", EXAMPLES.values(), ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_every_error_reaches_the_client_with_its_details(service: Any, error: ParleyError, method: str) -> None:
    raising, stub = service
    raising.error = error
    with pytest.raises(grpc.RpcError) as raised:
        if method == "Generate":
            await stub.Generate(ask("x", request_id="r1"), timeout=5)
        else:
            assert [r.content async for r in stub.GenerateStream(ask("x", request_id="r1"), timeout=5)] == ["first"]
    assert raised.value.code() == CODES[error.reason]
    assert reason_of(raised.value) == error.reason.value
    assert dict(error_info_of(raised.value).metadata) == error.metadata
    assert dict([*raised.value.trailing_metadata()])["x-request-id"] == "r1"
    if isinstance(error, errors.InvalidRequest):
        assert violated_fields(raised.value) == ["a.b", "c"]
    if error.retry_after_s is not None:
        assert retry_delay_of(raised.value) == error.retry_after_s
    assert "secret" not in raised.value.details()


async def test_a_subclass_keeps_its_bases_status(service: Any) -> None:
    class OutOfBlocks(errors.QueueFull):
        pass

    raising, stub = service
    raising.error = OutOfBlocks("full", 1.0)
    with pytest.raises(grpc.RpcError) as raised:
        await stub.Generate(ask("x"), timeout=5)
    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    del OutOfBlocks, raising.error
    import gc

    gc.collect()  # so that the walk over subclasses does not find it


async def test_an_unexpected_exception_is_internal_and_its_text_stays_in_the_log(
    service: Any, caplog: pytest.LogCaptureFixture
) -> None:
    raising, stub = service
    raising.error = ZeroDivisionError("secret text")
    with pytest.raises(grpc.RpcError) as raised:
        await stub.Generate(ask("x", request_id="r2"), timeout=5)
    assert raised.value.details() == "internal error (request r2)"
    assert reason_of(raised.value) == "INTERNAL"
    assert "secret" not in str([*raised.value.trailing_metadata()])
    assert "secret text" in caplog.text


async def test_a_cancelled_call_is_no_error_in_the_log(service: Any, caplog: pytest.LogCaptureFixture) -> None:
    raising, _ = service
    blocked, ended = asyncio.Event(), asyncio.Event()

    async def wait(request: Any, context: Any) -> Any:
        blocked.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    raising.Generate = wait  # type: ignore[method-assign]
    server = grpc.aio.server(
        interceptors=[CallInterceptor("parley.v1.ChatService", OPEN, lambda *_: None, lambda *_: None, lambda _: b"")]
    )
    chat_pb2_grpc.add_ChatServiceServicer_to_server(raising, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = chat_pb2_grpc.ChatServiceStub(channel).Generate(ask("x"))
        await asyncio.wait_for(blocked.wait(), 5)
        call.cancel()
        await asyncio.wait_for(ended.wait(), 5)
    await server.stop(None)
    assert "Traceback" not in caplog.text
