"""Several async generators as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from typing import TypeVar

T = TypeVar("T")


async def interleave(generators: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    """The items of all, each as it comes. An error of one, or closing this generator early, closes them all.

    While nobody takes items from here, each generator goes on by one item at most.
    """
    pending = {asyncio.ensure_future(anext(generator)): generator for generator in generators}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for item in [item for item in pending if item in done]:
                generator = pending.pop(item)
                try:
                    value = item.result()
                except StopAsyncIteration:
                    continue
                pending[asyncio.ensure_future(anext(generator))] = generator
                yield value
    finally:
        # Whoever is cancelled amid this, say after an error, leaves none of them open.
        await asyncio.shield(_close(generators, pending))


async def _close(generators: Sequence[AsyncGenerator[T]], pending: Collection[asyncio.Future[T]]) -> None:
    for item in pending:
        item.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for generator in generators:
        await generator.aclose()
