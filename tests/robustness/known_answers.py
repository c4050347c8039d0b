"""Traffic to a replica with a real model: what it answers undisturbed is asked first, and then asked for again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import grpc

from parley.v1 import chat_pb2, chat_pb2_grpc
from tests.robustness.traffic import Outcomes
from tests.support.requests import ask

_TIMEOUT_S = 300.0
_TEXTS = ("Tell me a story.", "Name some rivers.", "Why is the sky blue?", "Count to twenty.", "What is a lighthouse?")
_CONFIGS: tuple[dict[str, Any], ...] = (
    {},
    {"do_sample": True, "temperature": 0.9, "seed": 1},
    {"do_sample": True, "top_k": 20, "presence_penalty": 0.5, "seed": 2, "logprobs": True},
    {"repetition_penalty": 1.2, "stop_strings": ["never said"]},
)


class KnownAnswers:
    """See Traffic. Each of the questions is asked in each of the ways; ids and texts must be the undisturbed ones."""

    def __init__(self, target: str, chance: random.Random, num_clients: int, num_tokens: int = 24) -> None:
        self.outcomes = Outcomes()
        self.num_begun = 0
        self.num_tokens = 0
        self._target = target
        self._chance = chance
        self._num_clients = num_clients
        self._requests = [ask(text, max_new_tokens=num_tokens, **config) for text in _TEXTS for config in _CONFIGS]

    async def run(self, is_over: Callable[[int], bool]) -> None:
        """Asks undisturbed first; then until `is_over` says so of the number begun."""
        async with grpc.aio.insecure_channel(self._target) as channel:
            stub = chat_pb2_grpc.ChatServiceStub(channel)
            expected = [await self._unary(stub, request) for request in self._requests]

            async def client() -> None:
                while not is_over(self.num_begun):
                    self.num_begun += 1
                    index = self._chance.randrange(len(self._requests))
                    is_stream = self._chance.random() < 0.6
                    kind = "stream" if is_stream else "unary"
                    try:
                        answer = await (self._stream if is_stream else self._unary)(stub, self._requests[index])
                    except grpc.RpcError as error:
                        self.outcomes.expect(kind, False, (error.code(), error.details()))
                    else:
                        self.outcomes.expect(kind, answer == expected[index], (answer, expected[index]))
                        self.num_tokens += len(answer[1])

            await asyncio.gather(*(client() for _ in range(self._num_clients)))

    async def _unary(
        self, stub: chat_pb2_grpc.ChatServiceStub, request: chat_pb2.GenerateRequest
    ) -> tuple[str, list[int]]:
        (choice,) = (await stub.Generate(request, timeout=_TIMEOUT_S)).choices
        return choice.message.content, list(choice.token_ids)

    async def _stream(
        self, stub: chat_pb2_grpc.ChatServiceStub, request: chat_pb2.GenerateRequest
    ) -> tuple[str, list[int]]:
        content, ids = "", list[int]()
        async for delta in stub.GenerateStream(request, timeout=_TIMEOUT_S):
            content += delta.content
            ids += delta.token_ids
        return content, ids
