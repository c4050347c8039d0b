"""Traffic whose right answers are known: each request is asked in one of many ways, and what came of it is kept."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import grpc

from parley.v1 import chat_pb2, chat_pb2_grpc, generation_pb2
from tests.support.requests import ask, reason_of

_TIMEOUT_S = 120.0
_STOP = generation_pb2.FINISH_REASON_STOP


@dataclass
class Outcomes:
    """How many requests ended in which way, and everything that should not have been."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def expect(self, name: str, is_right: bool, what: object) -> None:
        """Counts one that ended; keeps `what` it said if that is not right."""
        self.counts[name] += 1
        if not is_right:
            self.faults.append(f"{name}: {what!r}")

    @property
    def num_ended(self) -> int:
        return self.counts.total()


class Traffic:
    """Requests to one replica, one after the other from each of `num_clients` clients, until told to stop.

    Each has a deadline, unless `timeout_s` is None.
    """

    def __init__(
        self, target: str, chance: random.Random, num_clients: int, timeout_s: float | None = _TIMEOUT_S
    ) -> None:
        self.outcomes = Outcomes()
        self.num_begun = 0
        self._target = target
        self._chance = chance
        self._num_clients = num_clients
        self._timeout_s = timeout_s

    async def run(self, is_over: Callable[[int], bool]) -> None:
        """Each client begins new requests until `is_over` says so of the number begun; returns when all have ended."""
        async with grpc.aio.insecure_channel(self._target) as channel:
            stub = chat_pb2_grpc.ChatServiceStub(channel)
            weights = {
                self._unary: 6, self._stream: 8, self._choices: 1, self._batch: 1, self._cancelled: 2, self._failing: 1,
            }  # fmt: skip

            async def client() -> None:
                while not is_over(self.num_begun):
                    self.num_begun += 1
                    (behaviour,) = self._chance.choices([*weights], weights.values())
                    await self._guard(behaviour, stub)

            await asyncio.gather(*(client() for _ in range(self._num_clients)))

    async def _guard(self, behaviour: Callable[..., Awaitable[None]], stub: chat_pb2_grpc.ChatServiceStub) -> None:
        try:
            await behaviour(stub, self._text())
        except grpc.RpcError as error:
            self.outcomes.expect(behaviour.__name__, False, (error.code(), error.details()))

    def _text(self) -> str:
        return f"{self._chance.randrange(10**9)} " * self._chance.randint(1, 15)

    async def _unary(self, stub: chat_pb2_grpc.ChatServiceStub, text: str) -> None:
        response = await stub.Generate(ask(text), timeout=self._timeout_s)
        (choice,) = response.choices
        self.outcomes.expect("unary", choice.message.content == text and choice.finish_reason == _STOP, choice)

    async def _stream(self, stub: chat_pb2_grpc.ChatServiceStub, text: str) -> None:
        content, ids, ends = "", list[int](), 0
        async for response in stub.GenerateStream(ask(text), timeout=self._timeout_s):
            content += response.content
            ids += response.token_ids
            ends += response.finish_reason == _STOP
        is_right = content == text and bytes(ids[:-1]).decode() == text and ends == 1
        self.outcomes.expect("stream", is_right, (text, content, ids, ends))

    async def _choices(self, stub: chat_pb2_grpc.ChatServiceStub, text: str) -> None:
        request = ask(text, do_sample=True, num_return_sequences=3)
        response = await stub.Generate(request, timeout=self._timeout_s)
        contents = [choice.message.content for choice in response.choices]
        self.outcomes.expect("choices", contents == [text] * 3, contents)

    async def _batch(self, stub: chat_pb2_grpc.ChatServiceStub, text: str) -> None:
        texts = [f"{text}{i}" for i in range(5)]
        contents = {}
        async for item in stub.GenerateBatch(
            chat_pb2.GenerateBatchRequest(requests=[ask(one) for one in texts]), timeout=self._timeout_s
        ):
            contents[item.index] = item.response.choices[0].message.content if item.HasField("response") else item.error
        self.outcomes.expect("batch", contents == dict(enumerate(texts)), contents)

    async def _cancelled(self, stub: chat_pb2_grpc.ChatServiceStub, _: str) -> None:
        call = stub.GenerateStream(ask("!forever", max_new_tokens=4000), timeout=self._timeout_s)
        if self._chance.random() < 0.7:
            await call.read()
        call.cancel()
        self.outcomes.expect("cancelled", True, None)

    async def _failing(self, stub: chat_pb2_grpc.ChatServiceStub, _: str) -> None:
        try:
            await stub.Generate(ask("!fail"), timeout=self._timeout_s)
        except grpc.RpcError as error:
            self.outcomes.expect("failing", reason_of(error) == "INTERNAL", (error.code(), error.details()))
        else:
            self.outcomes.expect("failing", False, "an answer")
