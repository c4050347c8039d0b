"""GenerateBatch: many requests in one call, each answered or refused as if it had come alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from parley.v1 import chat_pb2
from parleyd.errors import InvalidRequest, Violation
from parleyd.rpc import status
from parleyd.rpc.interceptors import MAX_BATCH_REQUESTS, named_error, request_id_of
from parleyd.telemetry.call import Call, current_call

# Beside as many as can run. They wait in the server's queue, so that a slot that gets free is taken at once.
_NUM_SPARE = 16

_Prepared = TypeVar("_Prepared")


async def answer_batch(
    requests: Sequence[chat_pb2.GenerateRequest],
    prepare: Callable[[chat_pb2.GenerateRequest], Awaitable[_Prepared]],
    answer: Callable[[_Prepared], Awaitable[chat_pb2.GenerateResponse]],
    item_ended: Callable[[Call, str], None],
    max_running: int,
) -> AsyncGenerator[chat_pb2.GenerateBatchResponse]:
    """Each item's outcome as it finishes. Items queue beside all other requests, those of higher priority first.

    `prepare` checks a request and makes its prompt; `answer` waits for a slot and generates. What they raise fails the
    item alone. `item_ended` is told of each item and its status code. Closing the generator cancels what is open.
    While nobody takes outcomes, no more items begin than `max_running` and some: what waits for the reader is bounded.
    Raises InvalidRequest if the number of items is wrong.
    """
    if not 1 <= len(requests) <= MAX_BATCH_REQUESTS:
        raise InvalidRequest([Violation("requests", f"must hold 1 to {MAX_BATCH_REQUESTS:,}, not {len(requests):,}")])
    batch = current_call.get()
    # One item after the other: they join the queue in their order, other calls' prompts do not wait behind a thousand,
    # and what has not begun costs nothing.
    preparing = asyncio.Lock()
    # For items that have begun and whose outcome is not taken. To have them wait once they are answered bounds nothing.
    room = asyncio.Semaphore(max_running + _NUM_SPARE)
    outcomes: asyncio.Queue[chat_pb2.GenerateBatchResponse | None] = asyncio.Queue()

    async def serve(index: int) -> None:
        request = requests[index]
        call = replace(batch, request_id=request_id_of(request), batch=batch, index=index)
        current_call.set(call)  # of this item's task
        try:
            try:
                prepared = await prepare(request)
            finally:
                preparing.release()
            outcome = chat_pb2.GenerateBatchResponse(index=index, response=await answer(prepared))
            item_ended(call, "OK")
        except asyncio.CancelledError:
            item_ended(call, call.cancelled_code)
            raise
        except Exception as error:
            named = named_error(call, error)
            outcome = chat_pb2.GenerateBatchResponse(index=index, error=status.to_status(named, call.request_id))
            item_ended(call, status.code_of(named).name)
        outcomes.put_nowait(outcome)

    async def serve_all() -> None:
        # No TaskGroup: that of a cancelled batch keeps the requests until garbage is collected.
        items: list[asyncio.Task[None]] = []
        try:
            for index in sorted(range(len(requests)), key=lambda index: -requests[index].priority):
                await room.acquire()
                await preparing.acquire()
                items.append(asyncio.create_task(serve(index)))
            await asyncio.gather(*items)
        finally:
            for item in items:
                item.cancel()
            await asyncio.gather(*items, return_exceptions=True)
            outcomes.put_nowait(None)

    service = asyncio.create_task(serve_all())
    try:
        while (outcome := await outcomes.get()) is not None:
            yield outcome
            room.release()
        await service
    finally:
        service.cancel()
        await asyncio.gather(service, return_exceptions=True)
