"""Traffic while the worker dies in every way and clients misbehave: each request ends once, and rightly."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.robustness.failpoints import (
    FAULTS,
    KEEPALIVE_TIME_S,
    KEEPALIVE_TIMEOUT_S,
    SLOW_READER_TIMEOUT_S,
    WORKER_TIMEOUT_S,
    Failpoint,
    is_anyone_suspected,
    kill_worker,
    stop_worker_for_a_moment,
    vanish,
)
from tests.robustness.traffic import Traffic
from tests.robustness.validators import Belongings, assert_idle, assert_no_leaks, assert_no_orphans, tasks_at_rest
from tests.support.gateway import GatewayThread, scripted_command, scripted_settings
from tests.support.wall_clock import jumping_clock

pytestmark = pytest.mark.timeout(0)

_NUM_CLIENTS = 24
# Of a request: to be suspected for longer is to hang.
_MAX_SUSPICION_S = 100.0


@pytest.mark.parametrize("spare_worker", [False, True])
def test_no_answer_is_lost_doubled_or_crossed_whatever_happens_to_the_worker(
    tokenizer_folder: Path, chance: random.Random, seconds: float, before: Belongings, spare_worker: bool
) -> None:
    with _replica(tokenizer_folder, spare_worker=spare_worker) as gateway:
        at_rest = tasks_at_rest(gateway)
        traffic = Traffic(gateway.target, chance, _NUM_CLIENTS)
        dealt = asyncio.run(_traffic_under_faults(gateway, traffic, chance, seconds, FAULTS))
        print(f"{traffic.num_begun} requests, {dict(traffic.outcomes.counts)}, {len(dealt)} faults: {sorted(dealt)}")
        num_restarts, num_handed_over = gateway.gateway.supervisor.num_restarts, gateway.gateway.worker.num_handed_over
        print(f"{num_restarts} workers replaced, {num_handed_over} requests handed over")
        assert traffic.outcomes.faults == []
        assert traffic.outcomes.num_ended == traffic.num_begun > 50
        assert num_handed_over > 0
        assert_idle(gateway, at_rest)
    assert_no_leaks(before)
    assert_no_orphans(tokenizer_folder)


def test_a_wall_clock_that_jumps_changes_no_answer_and_replaces_no_worker(
    tokenizer_folder: Path, chance: random.Random, seconds: float, before: Belongings
) -> None:
    failpoints = (kill_worker, stop_worker_for_a_moment, vanish)
    with _replica(tokenizer_folder) as gateway:
        at_rest = tasks_at_rest(gateway)
        traffic = Traffic(gateway.target, chance, _NUM_CLIENTS, timeout_s=None)
        with jumping_clock(gateway.thread):
            dealt = asyncio.run(_traffic_under_faults(gateway, traffic, chance, seconds / 2, failpoints))
        assert traffic.outcomes.faults == []
        assert traffic.outcomes.num_ended == traffic.num_begun > _NUM_CLIENTS
        assert 0 < gateway.gateway.supervisor.num_restarts <= dealt.count("kill_worker")
        assert_idle(gateway, at_rest)
    assert_no_leaks(before)
    assert_no_orphans(tokenizer_folder)


def _replica(folder: Path, **server: Any) -> GatewayThread:
    settings = scripted_settings(
        max_running=16,
        max_queue=100,
        max_worker_restarts=20,
        worker_timeout=WORKER_TIMEOUT_S,
        slow_reader_timeout=SLOW_READER_TIMEOUT_S,
        keepalive_time=KEEPALIVE_TIME_S,
        keepalive_timeout=KEEPALIVE_TIMEOUT_S,
        **server,
    )
    return GatewayThread(settings, scripted_command(folder, "--step-delay", "0.002", "--max-running", "16"))


async def _traffic_under_faults(
    gateway: GatewayThread, traffic: Traffic, chance: random.Random, seconds: float, failpoints: Sequence[Failpoint]
) -> list[str]:
    """The names of the failpoints that were set off."""
    dealt: list[str] = []
    end = time.monotonic() + seconds

    async def deal() -> None:
        # Every failpoint once, then by chance.
        planned: list[Failpoint] = [*failpoints]
        chance.shuffle(planned)
        while time.monotonic() < end or planned:
            failpoint = planned.pop() if planned else chance.choice(failpoints)
            async with asyncio.timeout(_MAX_SUSPICION_S):
                while is_anyone_suspected(gateway):
                    await asyncio.sleep(0.01)
            await failpoint(gateway, chance)
            dealt.append(failpoint.__name__)
            await asyncio.sleep(chance.uniform(0.2, 1.2))

    dealing = asyncio.create_task(deal())
    await traffic.run(lambda _: time.monotonic() > end and dealing.done())
    await dealing
    return dealt
