"""A prepared request on its way through the worker."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest

from parleyd.errors import DeadlineExceeded
from parleyd.gateway.admission import Admission
from parleyd.gateway.answer import Answer, AnswerDelta
from parleyd.gateway.fair_queue import Ticket
from parleyd.gateway.runner import Generation, Runner
from parleyd.gateway.streamer import Delta
from parleyd.gateway.worker_client import WorkerClient
from parleyd.generation import FinishReason, SamplingParams
from parleyd.telemetry.call import Call, current_call


class Worker:
    """Makes tokens until its generator is closed."""

    is_aborted, made_at = False, 0.0

    def next_key(self) -> int:
        return 0

    async def generate(self, *_: Any, **__: Any) -> AsyncGenerator[Delta]:
        try:
            while True:
                yield Delta([0], None, made_at=self.made_at)
        finally:
            self.is_aborted = True


class Stopped:
    """An answer that its first token ends, as a stop string does."""

    num_tokens = 1

    def push(self, delta: Delta) -> AnswerDelta:
        return AnswerDelta(token_ids=delta.token_ids, finish_reason=FinishReason.STOP)


def generation() -> Generation:
    return Generation(
        prompt_ids=(0,), params=SamplingParams(max_new_tokens=9), answers=[cast(Answer, Stopped())],
        priority=0, deadline=None, grammar_field="", interval=1,
    )  # fmt: skip


async def test_what_a_stop_string_ends_is_aborted_before_its_last_delta_leaves_however_late_that_is_read() -> None:
    current_call.set(Call("Generate", "request"))
    worker, admission = Worker(), Admission(1, 0, max_queue_tokens=1, refuse_late=False)
    runner = Runner(admission, AsyncMock(), cast(WorkerClient, worker), knows_clients=False)
    async with aclosing(runner.run(generation())) as deltas:
        assert (await anext(deltas)).finish_reason is FinishReason.STOP
        assert worker.is_aborted
    assert admission.num_running == 0


async def test_how_long_first_tokens_take_from_their_slots_tells_which_requests_come_too_late() -> None:
    worker, admission = Worker(), Admission(1, 0, max_queue_tokens=1, refuse_late=True)
    runner = Runner(admission, AsyncMock(), cast(WorkerClient, worker), knows_clients=False)
    for _ in range(8):
        now = time.monotonic()
        current_call.set(Call("Generate", "request", arrived=now - 1000.0))
        worker.made_at = now + 60.0
        async with aclosing(runner.run(generation())) as deltas:
            await anext(deltas)
    with pytest.raises(DeadlineExceeded):
        await admission.acquire(Ticket(num_tokens=1, deadline=time.monotonic() + 10.0))
    (await admission.acquire(Ticket(num_tokens=1, deadline=time.monotonic() + 50.0))).release()
