"""A disk that is full where a model is converted: its start fails in a line, and a replica beside it goes on."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.robustness.traffic import Traffic
from tests.robustness.validators import Belongings, assert_idle, assert_no_leaks, tasks_at_rest
from tests.support.gateway import GatewayThread, scripted_command, scripted_settings
from tests.support.served import serve_until_exit
from tests.support.small_disk import SmallDisk, small_disk
from tests.support.tiny_gguf import write_gguf

_DISK_BYTES = 4 * 2**20
# For a conversion's first files, but not for its weights.
_ROOM_BYTES = 64 * 2**10
_NUM_CLIENTS = 4


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", _DISK_BYTES) as disk:
        disk.fill(_ROOM_BYTES)
        yield disk


def test_a_start_on_a_full_disk_beside_traffic_fails_in_a_line_and_leaves_nothing(
    tmp_path: Path, tokenizer_folder: Path, disk: SmallDisk, chance: random.Random, before: Belongings
) -> None:
    settings = scripted_settings(max_running=_NUM_CLIENTS, max_queue=100)
    with GatewayThread(settings, scripted_command(tokenizer_folder, "--step-delay", "0.02")) as gateway:
        at_rest = tasks_at_rest(gateway)
        traffic = Traffic(gateway.target, chance, _NUM_CLIENTS)
        failed = asyncio.run(_start_under_traffic(write_gguf(tmp_path / "tiny.gguf"), disk, traffic))
        assert failed.returncode == 1
        assert "Traceback" not in failed.stderr
        error = r"cannot write the cache folder .*: (No space left on device|File too large); make room there"
        assert re.search(error, failed.stderr.splitlines()[-1])
        assert disk.contents() == []
        assert traffic.outcomes.faults == []
        assert traffic.outcomes.num_ended == traffic.num_begun >= _NUM_CLIENTS
        assert gateway.gateway.supervisor.num_restarts == 0
        assert_idle(gateway, at_rest)
    assert_no_leaks(before)


async def _start_under_traffic(model: Path, disk: SmallDisk, traffic: Traffic) -> CompletedProcess[str]:
    """What came of the start."""
    arguments = ["serve", "--port", "0", "--model", str(model), "--cache", str(disk.folder)]
    starting = asyncio.create_task(asyncio.to_thread(serve_until_exit, arguments, prefix=disk.prefix))
    await traffic.run(lambda _: starting.done())
    return await starting
