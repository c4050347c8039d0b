"""What an event loop is busy with."""

from __future__ import annotations

import asyncio
from collections import Counter


async def other_tasks() -> Counter[str]:
    """All tasks of the running event loop but the caller's, counted by the names of their coroutines."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    return Counter(getattr(task.get_coro(), "__qualname__", repr(task)) for task in others)
