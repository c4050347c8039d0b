"""Several generators as one: nothing lost, nothing left open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from parleyd.gateway.interleave import interleave


class Source:
    """A generator of numbers, with a turn of the event loop before each; fails or waits for ever once it is through."""

    def __init__(self, count: int, then: str = "end") -> None:
        self.num_given = 0
        self.is_closed = False
        self.items = self._items(count, then)

    async def _items(self, count: int, then: str) -> AsyncGenerator[int]:
        try:
            while self.num_given < count:
                await asyncio.sleep(0)
                self.num_given += 1
                yield self.num_given
            if then == "fail":
                raise RuntimeError("as told")
            if then == "wait":
                await asyncio.Event().wait()
        finally:
            self.is_closed = True


async def test_all_items_come_each_source_in_its_order() -> None:
    sources = [Source(count) for count in (3, 0, 5)]
    assert sorted([item async for item in interleave([source.items for source in sources])]) == [1, 1, 2, 2, 3, 3, 4, 5]
    assert all(source.is_closed for source in sources)


async def test_sources_take_turns() -> None:
    sources = [Source(1, "wait"), Source(1000)]
    async with aclosing(interleave([source.items for source in sources])) as items:
        assert [await anext(items) for _ in range(3)] == [1, 1, 2]


async def test_an_error_of_one_ends_all() -> None:
    sources = [Source(2, "fail"), Source(1, "wait"), Source(1000)]
    with pytest.raises(RuntimeError, match="as told"):
        async for _ in interleave([source.items for source in sources]):
            pass
    assert all(source.is_closed for source in sources)
    assert sources[2].num_given < 1000


async def test_closing_early_closes_all() -> None:
    sources = [Source(1000), Source(0, "wait"), Source(1000)]
    async with aclosing(interleave([source.items for source in sources])) as items:
        await anext(items)
    assert all(source.is_closed for source in sources)


async def _take_all(sources: list[Source]) -> None:
    async with aclosing(interleave([source.items for source in sources])) as items:
        async for _ in items:
            pass


@pytest.mark.parametrize("num_turns", range(5, 25))
async def test_who_is_cancelled_as_one_fails_closes_all(num_turns: int) -> None:
    sources = [Source(2, "fail"), Source(0, "wait"), Source(1000)]
    taking = asyncio.create_task(_take_all(sources))
    for _ in range(num_turns):
        await asyncio.sleep(0)
    taking.cancel()
    await asyncio.wait([taking])
    for _ in range(10):
        await asyncio.sleep(0)
    assert all(source.is_closed or not source.num_given for source in sources)


async def test_who_takes_nothing_stops_the_sources() -> None:
    sources = [Source(1000), Source(1000)]
    async with aclosing(interleave([source.items for source in sources])) as items:
        await anext(items)
        for _ in range(100):
            await asyncio.sleep(0)
        assert all(source.num_given <= 2 for source in sources)
