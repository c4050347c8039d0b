"""Two replicas behind one client: whichever dies or is restarted, its streams go on at the other."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from parley_client import AsyncClient, user
from tests.robustness.traffic import Outcomes
from tests.robustness.validators import assert_no_orphans
from tests.support.replica import Replica, start_replicas

pytestmark = pytest.mark.timeout(0)

_NUM_CLIENTS = 12


@pytest.fixture
def replicas(tokenizer_folder: Path) -> Iterator[list[Replica]]:
    started = start_replicas(2, tokenizer_folder, "--drain-timeout", "0.5", "--step-delay", "0.01")
    yield started
    for replica in started:
        replica.stop()
    assert_no_orphans(tokenizer_folder)


def test_streams_survive_the_death_of_their_replica(
    replicas: list[Replica], chance: random.Random, seconds: float
) -> None:
    def kill_one() -> None:
        replica = chance.choice(replicas)
        replica.kill()
        time.sleep(chance.uniform(0, 0.3))
        replica.start()

    outcomes = asyncio.run(_streams_while(replicas, chance, kill_one, seconds))
    assert outcomes.faults == []
    assert outcomes.num_ended > 20


def test_a_rolling_restart_under_load_loses_nothing(
    replicas: list[Replica], chance: random.Random, seconds: float
) -> None:
    turns = iter(replicas * 1000)

    def restart_next() -> None:
        replica = next(turns)
        replica.terminate()
        replica.start()

    outcomes = asyncio.run(_streams_while(replicas, chance, restart_next, seconds))
    assert outcomes.faults == []
    assert outcomes.num_ended > 20


async def _streams_while(
    replicas: list[Replica], chance: random.Random, disturb: Callable[[], None], seconds: float
) -> Outcomes:
    """Streams and whole answers from a few clients, while `disturb` is called again and again, twice at least."""
    outcomes = Outcomes()
    end = time.monotonic() + seconds
    num_disturbances = 0

    async def disturber() -> None:
        nonlocal num_disturbances
        while time.monotonic() < end or num_disturbances < 2:
            await asyncio.sleep(chance.uniform(0.3, 1.0))
            await asyncio.to_thread(disturb)
            num_disturbances += 1

    disturbing = asyncio.create_task(disturber())
    async with AsyncClient("ipv4:" + ",".join(replica.address for replica in replicas)) as client:

        async def ask_on() -> None:
            behaviours: list[Callable[[AsyncClient, str, Outcomes], Awaitable[None]]] = [_stream, _stream, _chat]
            while not disturbing.done():
                behaviour = chance.choice(behaviours)
                # A whole answer is begun again where a stream goes on: it must be short to come through within a few.
                text = f"{chance.randrange(10**9)} " * (
                    chance.randint(1, 3) if behaviour is _chat else chance.randint(5, 20)
                )
                await behaviour(client, text, outcomes)

        await asyncio.gather(*(ask_on() for _ in range(_NUM_CLIENTS)))
    await disturbing
    print(f"{dict(outcomes.counts)}, {num_disturbances} disturbances")
    return outcomes


async def _stream(client: AsyncClient, text: str, outcomes: Outcomes) -> None:
    try:
        stream = client.stream([user(text)], timeout=60)
        content = "".join([str(piece) async for piece in stream])
        usage = stream.reply.usage
    except Exception as error:
        outcomes.expect("stream", False, repr(error))
    else:
        is_right = content == text and usage.completion_tokens == len(text) + 1
        outcomes.expect("stream", is_right, (text, content, usage))


async def _chat(client: AsyncClient, text: str, outcomes: Outcomes) -> None:
    try:
        reply = await client.chat([user(text)], timeout=60)
    except Exception as error:
        outcomes.expect("chat", False, repr(error))
    else:
        outcomes.expect("chat", reply.content == text, (text, reply.content))
