"""One request's way back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from parleyd.errors import EngineFault, WorkerLost
from parleyd.gateway.streamer import Streamer
from parleyd.generation import FinishReason, Output, TokenLogprob


async def test_what_a_slow_reader_has_not_taken_is_merged() -> None:
    streamer = Streamer()
    for token_id in range(5):
        streamer.put(Output(key=1, token_ids=(token_id,)))
    delta = await streamer.take()
    assert (delta.token_ids, delta.finish_reason) == ([0, 1, 2, 3, 4], None)
    streamer.put(Output(key=1, token_ids=(5,), finish_reason=FinishReason.STOP))
    delta = await streamer.take()
    assert (delta.token_ids, delta.finish_reason) == ([5], FinishReason.STOP)


async def test_what_a_later_worker_finds_in_its_cache_is_not_told() -> None:
    streamer = Streamer()
    for token_id, num_cached in enumerate((2, 5)):
        streamer.put(Output(key=1, token_ids=(token_id,), cached_prompt_tokens=num_cached))
    assert (await streamer.take()).cached_prompt_tokens == 2


@pytest.mark.parametrize(("has_logprobs", "num_deltas"), [(False, 3), (True, 19)])
async def test_what_is_merged_is_taken_in_parts_that_fit_into_a_message(has_logprobs: bool, num_deltas: int) -> None:
    streamer = Streamer()
    logprobs = [TokenLogprob(-float(i)) for i in range(600)] if has_logprobs else []
    for token_id in range(600):
        reason = FinishReason.STOP if token_id == 599 else None
        own = tuple(logprobs[token_id : token_id + 1])
        streamer.put(Output(key=1, token_ids=(token_id,), logprobs=own, finish_reason=reason))
    deltas = [await streamer.take() for _ in range(num_deltas)]
    assert [token_id for delta in deltas for token_id in delta.token_ids] == [*range(600)]
    assert [logprob for delta in deltas for logprob in delta.logprobs] == logprobs
    most = 32 if has_logprobs else 256
    assert all(len(delta.logprobs) in (0, len(delta.token_ids)) for delta in deltas)
    assert max(len(delta.token_ids) for delta in deltas) == most
    assert [delta.finish_reason for delta in deltas] == [None] * (num_deltas - 1) + [FinishReason.STOP]


async def test_deltas_wait_for_so_many_ids_but_the_first_and_the_last() -> None:
    streamer = Streamer(interval=3)
    taken = []

    async def take_all() -> None:
        while not taken or taken[-1].finish_reason is None:
            taken.append(await streamer.take())

    taking = asyncio.create_task(take_all())
    for token_id in range(9):
        streamer.put(Output(key=1, token_ids=(token_id,), finish_reason=FinishReason.STOP if token_id == 8 else None))
        await asyncio.sleep(0)
    await taking
    assert [delta.token_ids for delta in taken] == [[0], [1, 2, 3], [4, 5, 6], [7, 8]]


async def test_ids_that_wait_for_others_come_before_the_error() -> None:
    streamer = Streamer(interval=3)
    streamer.put(Output(key=1, token_ids=(0,)))
    assert (await streamer.take()).token_ids == [0]
    streamer.put(Output(key=1, token_ids=(1,)))
    streamer.fail(WorkerLost())
    assert (await streamer.take()).token_ids == [1]
    with pytest.raises(WorkerLost):
        await streamer.take()


async def test_a_reader_waits_for_the_next_ids() -> None:
    streamer = Streamer()
    taking = asyncio.create_task(streamer.take())
    await asyncio.sleep(0)
    assert not taking.done()
    streamer.put(Output(key=1, token_ids=(7,)))
    assert (await taking).token_ids == [7]


@pytest.mark.parametrize("fail", [lambda s: s.fail(WorkerLost()), lambda s: s.put(Output(key=1, error="broken"))])
async def test_ids_already_here_come_before_the_error_and_the_worker_is_done_before_they_are_taken(
    fail: Callable[[Streamer], None],
) -> None:
    ends: list[str] = []
    streamer = Streamer(lambda: ends.append("end"))
    streamer.put(Output(key=1, token_ids=(1, 2)))
    assert not ends
    fail(streamer)
    assert ends == ["end"]
    assert (await streamer.take()).token_ids == [1, 2]
    with pytest.raises((WorkerLost, EngineFault)):
        await streamer.take()


@pytest.mark.parametrize("last", [{"finish_reason": FinishReason.LENGTH}, {"error": "broken"}])
async def test_an_answer_that_has_ended_cannot_fail_any_more(last: dict[str, Any]) -> None:
    ends: list[str] = []
    streamer = Streamer(lambda: ends.append("end"))
    streamer.put(Output(key=1, token_ids=(1,), **last))
    streamer.fail(WorkerLost())
    assert ends == ["end"]
    assert (await streamer.take()).finish_reason is last.get("finish_reason")
    if "error" in last:
        with pytest.raises(EngineFault):
            await streamer.take()


async def test_an_answer_may_end_without_another_id() -> None:
    streamer = Streamer()
    streamer.put(Output(key=1, finish_reason=FinishReason.LENGTH))
    delta = await streamer.take()
    assert (delta.token_ids, delta.finish_reason) == ([], FinishReason.LENGTH)
