"""The validators themselves: what they are there to find, put there on purpose."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.robustness.validators import assert_no_tasks_left, tasks_at_rest
from tests.support.gateway import GatewayThread, scripted_command, scripted_settings


async def _forgotten() -> None:
    await asyncio.Event().wait()


async def _begin() -> asyncio.Task[None]:
    return asyncio.create_task(_forgotten())


def test_a_task_that_is_left_in_the_gateway_is_named(tokenizer_folder: Path) -> None:
    with GatewayThread(scripted_settings(), scripted_command(tokenizer_folder)) as gateway:
        at_rest = tasks_at_rest(gateway)
        task = gateway.run(_begin())
        with pytest.raises(AssertionError, match=r"tasks are left: \{'_forgotten': 1\}"):
            assert_no_tasks_left(gateway, at_rest, timeout_s=0.1)
        gateway.loop.call_soon_threadsafe(task.cancel)
        assert_no_tasks_left(gateway, at_rest)


def test_a_task_that_outlives_the_gateway_is_named(tokenizer_folder: Path) -> None:
    with GatewayThread(scripted_settings(), scripted_command(tokenizer_folder)) as gateway:
        task = gateway.run(_begin())
        with pytest.raises(AssertionError, match=r"tasks outlived the gateway: \{'_forgotten': 1\}"):
            gateway.stop()
        gateway._left.clear()
    assert task.cancelled()  # by the end of its loop
