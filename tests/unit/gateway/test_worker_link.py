"""What goes over the socket pair, as the worker reads it."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from parleyd.gateway.worker_link import WorkerLink
from parleyd.generation import EngineRequest, SamplingParams
from parleyd.ipc import messages
from parleyd.ipc.framing import read_frame


async def test_what_changes_in_a_turn_of_the_loop_goes_in_one_message() -> None:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    link = WorkerLink(cast(asyncio.subprocess.Process, None), reader, writer)
    requests = [EngineRequest(key=key, prompt_ids=(1,), params=SamplingParams(max_new_tokens=1)) for key in range(3)]
    with theirs, theirs.makefile("rb") as stream:

        async def received() -> messages.ToWorker:
            payload = await asyncio.to_thread(read_frame, stream)
            assert payload is not None
            return messages.decode_to_worker(payload)

        link.submit(requests[0])
        link.abort(7)
        link.submit(requests[1])
        assert await received() == messages.Changes(requests[:2], [7])
        link.submit(requests[2])
        assert await received() == messages.Changes(requests[2:], [])
    writer.close()
    await writer.wait_closed()


async def test_large_requests_go_one_by_one_as_the_worker_takes_them() -> None:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    link = WorkerLink(cast(asyncio.subprocess.Process, None), reader, writer)
    params = SamplingParams(max_new_tokens=1, grammar="x" * 2**20)
    large = [EngineRequest(key=key, prompt_ids=(1,), params=params) for key in range(3)]
    small = [EngineRequest(key=key, prompt_ids=(1,), params=SamplingParams(max_new_tokens=1)) for key in range(3, 6)]
    with theirs, theirs.makefile("rb") as stream:

        async def received() -> messages.ToWorker:
            payload = await asyncio.to_thread(read_frame, stream)
            assert payload is not None
            return messages.decode_to_worker(payload)

        for request in (*large, *small):
            link.submit(request)
        link.abort(7)
        assert await received() == messages.Changes(large[:1], [7])
        link.abort(2)  # before its turn
        assert await received() == messages.Changes(large[1:2], [])
        assert await received() == messages.Changes(small, [])
        assert link.num_submitted == 5
    writer.close()
    await writer.wait_closed()


async def test_a_request_that_no_message_can_hold_keeps_no_other_from_the_worker() -> None:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    link = WorkerLink(cast(asyncio.subprocess.Process, None), reader, writer)
    params = SamplingParams(max_new_tokens=1)
    good = EngineRequest(key=1, prompt_ids=(1,), params=params)
    with theirs, theirs.makefile("rb") as stream:
        link.submit(EngineRequest(key=0, prompt_ids=(1,), params=params, cache_salt="\ud800"))
        await asyncio.sleep(0.01)
        link.submit(good)
        theirs.settimeout(5)
        payload = await asyncio.to_thread(read_frame, stream)
        assert payload is not None
        assert messages.decode_to_worker(payload) == messages.Changes([good], [])
    writer.close()
    await writer.wait_closed()


async def test_a_process_starts_in_a_folder_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "release").mkdir()
    monkeypatch.chdir(tmp_path / "release")
    (tmp_path / "release").rmdir()
    link = await WorkerLink.start((sys.executable, "-c", "import os; os.getcwd()"))
    assert await link.stop() == 0


@pytest.mark.parametrize("num_turns", range(4))
async def test_who_is_cancelled_as_the_process_ends_is_cancelled(num_turns: int) -> None:
    ended = asyncio.Event()
    process: Any = SimpleNamespace(wait=ended.wait, kill=lambda: None)
    ours, theirs = socket.socketpair()
    with theirs:
        stopping = asyncio.create_task(WorkerLink(process, *await asyncio.open_connection(sock=ours)).stop())
        await asyncio.sleep(0.01)
        ended.set()
        for _ in range(num_turns):
            await asyncio.sleep(0)
        is_cancelled = stopping.cancel()  # else it had ended before
        await asyncio.wait([stopping])
        assert stopping.cancelled() == is_cancelled
