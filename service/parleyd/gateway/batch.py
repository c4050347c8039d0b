"""GenerateBatch: many requests in one call, each answered or refused as if it had come alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

from parley.v1 import chat_pb2
from parleyd.errors import InvalidRequest, Violation
from parleyd.rpc import status
from parleyd.rpc.interceptors import named_error, request_id_of
from parleyd.telemetry.call import Call, current_call

MAX_REQUESTS = 1024
# Items of one batch whose prompts are made at the same time: other calls must not wait behind a thousand of them.
_MAX_PREPARING = 2

_Prepared = TypeVar("_Prepared")


async def answer_batch(
    requests: Sequence[chat_pb2.GenerateRequest],
    prepare: Callable[[chat_pb2.GenerateRequest], Awaitable[_Prepared]],
    answer: Callable[[_Prepared], Awaitable[chat_pb2.GenerateResponse]],
) -> AsyncGenerator[chat_pb2.GenerateBatchResponse]:
    """Each item's outcome as it finishes. Items queue beside all other requests, those of higher priority first.

    `prepare` checks a request and makes its prompt; `answer` waits for a slot and generates. What they raise fails the
    item alone. Closing the generator cancels what is open. Raises InvalidRequest if the number of items is wrong.
    """
    if not 1 <= len(requests) <= MAX_REQUESTS:
        raise InvalidRequest([Violation("requests", f"must hold 1 to {MAX_REQUESTS:,}, not {len(requests):,}")])
    preparing = asyncio.Semaphore(_MAX_PREPARING)
    batch = current_call.get()

    async def outcome(index: int) -> chat_pb2.GenerateBatchResponse:
        request = requests[index]
        call = Call(batch.method, request_id_of(request), batch.arrived)
        current_call.set(call)  # of this item's task
        try:
            async with preparing:
                prepared = await prepare(request)
            return chat_pb2.GenerateBatchResponse(index=index, response=await answer(prepared))
        except Exception as error:
            refusal = status.to_status(named_error(call, error), call.request_id)
            return chat_pb2.GenerateBatchResponse(index=index, error=refusal)

    by_priority = sorted(range(len(requests)), key=lambda index: -requests[index].priority)
    tasks = {asyncio.create_task(outcome(index)) for index in by_priority}
    for task in tasks:
        task.add_done_callback(tasks.discard)  # an answer is kept no longer than until it is sent
    try:
        for next_outcome in asyncio.as_completed(list(tasks)):
            yield await next_outcome
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
