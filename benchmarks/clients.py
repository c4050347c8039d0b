"""How the load generator speaks: gRPC to the service, OpenAI's HTTP streaming to its peers. Both as lean as can be."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import msgspec

from benchmarks.load import Refused
from benchmarks.workload import Request
from parley.v1 import chat_pb2, chat_pb2_grpc, generation_pb2, message_pb2

_TIMEOUT_S = 86_400.0  # who waits behind 10,000 others may expect more than an hour, and would be refused
_DATA = b"data: "
_DONE = b"[DONE]"
_ROLES = {"system": message_pb2.ROLE_SYSTEM, "user": message_pb2.ROLE_USER}


class GrpcClient:
    """The service. The stub itself: the Python client's comfort would count as the server's time."""

    def __init__(self, target: str) -> None:
        # Each client a connection of its own.
        self._channel = grpc.aio.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)])
        self._stub = chat_pb2_grpc.ChatServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def stream(self, request: Request) -> AsyncIterator[int]:
        """See load.Client."""
        try:
            async for response in self._stub.GenerateStream(_to_proto(request), timeout=_TIMEOUT_S):
                yield len(response.token_ids)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise Refused from error
            raise

    async def close(self) -> None:
        """Ends the connection and every call on it."""
        await self._channel.close()


class HttpClient:
    """A peer. `body` are fields that it needs beside OpenAI's, so that answers have exactly the wanted length."""

    def __init__(self, target: str, model: str, body: Mapping[str, Any]) -> None:
        import aiohttp  # of the extra `bench`; runs without peers do without it

        self._url = f"http://{target}/v1/chat/completions"
        self._common = {"model": model, "stream": True, "temperature": 0.0, **body}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)
        )

    async def stream(self, request: Request) -> AsyncIterator[int]:
        """See load.Client."""
        messages = [{"role": role, "content": content} for role, content in request.messages]
        body = {**self._common, "messages": messages, "max_tokens": request.new_tokens}
        seen = 0
        async with self._session.post(self._url, json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:200]}")
            async for chunk in response.content:
                if not chunk.startswith(_DATA) or chunk.startswith(_DATA + _DONE):
                    continue
                total = _num_tokens(msgspec.json.decode(chunk[len(_DATA) :]), seen)
                yield total - seen
                seen = total

    async def close(self) -> None:
        """Ends the connections."""
        await self._session.close()


def _num_tokens(chunk: dict[str, Any], seen: int) -> int:
    """All tokens up to this chunk: as its usage tells, else one more for each chunk with text."""
    if "error" in chunk:
        raise RuntimeError(str(chunk["error"])[:200])
    if usage := chunk.get("usage"):
        return int(usage["completion_tokens"])
    has_text = any(choice.get("delta", {}).get("content") for choice in chunk.get("choices", ()))
    return seen + bool(has_text)


def _to_proto(request: Request) -> chat_pb2.GenerateRequest:
    return chat_pb2.GenerateRequest(
        messages=[message_pb2.Message(role=_ROLES[role], content=content) for role, content in request.messages],
        generation_config=generation_pb2.GenerationConfig(
            max_new_tokens=request.new_tokens, ignore_eos=True, do_sample=False
        ),
        priority=request.priority,
    )
