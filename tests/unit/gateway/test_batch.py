"""What a batch keeps for a reader that does not take it."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import aclosing

import pytest

from parley.v1 import chat_pb2
from parleyd.gateway.batch import answer_batch
from parleyd.telemetry.call import Call, current_call

_NUM_REQUESTS = 500
_MAX_RUNNING = 4
_NUM_AHEAD = _MAX_RUNNING + 16


class Batch:
    """Requests that are answered at once, or never where `is_stuck`; counts what begins and how it ends."""

    def __init__(self, *, is_stuck: bool = False) -> None:
        current_call.set(Call("GenerateBatch", "a-batch"))
        self.num_begun = 0
        self.codes: Counter[str] = Counter()
        self._is_stuck = is_stuck
        requests = [chat_pb2.GenerateRequest() for _ in range(_NUM_REQUESTS)]
        self.outcomes = answer_batch(requests, self._prepare, self._answer, self._ended, _MAX_RUNNING)

    async def _prepare(self, _: chat_pb2.GenerateRequest) -> None:
        self.num_begun += 1

    async def _answer(self, _: None) -> chat_pb2.GenerateResponse:
        if self._is_stuck:
            await asyncio.Event().wait()
        return chat_pb2.GenerateResponse()

    def _ended(self, _: Call, code: str) -> None:
        self.codes[code] += 1


async def settle() -> None:
    for _ in range(20 * _NUM_REQUESTS):
        await asyncio.sleep(0)


async def test_who_takes_nothing_has_few_answers_kept_and_gets_all_once_he_reads() -> None:
    batch = Batch()
    async with aclosing(batch.outcomes):
        indexes = [(await anext(batch.outcomes)).index]
        await settle()
        assert batch.num_begun == batch.codes.total() == _NUM_AHEAD
        indexes.append((await anext(batch.outcomes)).index)
        await settle()
        assert batch.num_begun == _NUM_AHEAD + 1
        indexes += [outcome.index async for outcome in batch.outcomes]
    assert sorted(indexes) == list(range(_NUM_REQUESTS))
    assert batch.codes == {"OK": _NUM_REQUESTS}


@pytest.mark.parametrize("is_stuck", [False, True])
async def test_closing_a_batch_that_waits_for_its_reader_leaves_no_task(is_stuck: bool) -> None:
    batch = Batch(is_stuck=is_stuck)
    reader = asyncio.create_task(anext(batch.outcomes))  # type: ignore[arg-type]
    await settle()
    reader.cancel()
    await asyncio.wait([reader])
    await batch.outcomes.aclose()
    assert batch.num_begun == batch.codes.total() == _NUM_AHEAD
    assert set(batch.codes) == {"CANCELLED" if is_stuck else "OK"}
    assert asyncio.all_tasks() == {asyncio.current_task()}
