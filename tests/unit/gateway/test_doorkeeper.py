"""How many calls may be open, and that no client has all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from parleyd.errors import QueueFull
from parleyd.gateway.doorkeeper import Doorkeeper


def until_full(doorkeeper: Doorkeeper, client: str, num_bytes: int = 0) -> Iterator[str]:
    while True:
        try:
            doorkeeper.enter(client, num_bytes)
        except QueueFull:
            return
        yield client


def test_no_client_keeps_others_out_and_all_places_come_back() -> None:
    doorkeeper = Doorkeeper(is_ready=lambda: True, max_open=1344)
    taken = [client for client in (f"client-{i}" for i in range(10)) for client in until_full(doorkeeper, client)]
    numbers = [taken.count(f"client-{i}") for i in range(10)]
    assert numbers[0] >= 1344 * 8 // 9 - 1
    assert numbers[0] > numbers[1] > numbers[2] > 0
    for client in taken:
        doorkeeper.leave(client)
    assert doorkeeper.num_open == 0 and not doorkeeper._by_client
    assert [*until_full(doorkeeper, "again")] == ["again"] * numbers[0]


def test_the_last_place_is_for_who_has_none() -> None:
    doorkeeper = Doorkeeper(is_ready=lambda: True, max_open=2)
    doorkeeper.enter("a")
    doorkeeper.enter("b")
    with pytest.raises(QueueFull) as raised:
        doorkeeper.enter("c")
    assert raised.value.retry_after_s == 1


def test_no_client_keeps_others_out_by_the_size_of_its_requests() -> None:
    num_bytes = 2**20
    doorkeeper = Doorkeeper(is_ready=lambda: True, max_open=1344)
    taken = [client for client in "abc" for client in until_full(doorkeeper, client, num_bytes)]
    numbers = [taken.count(client) for client in "abc"]
    assert sum(numbers) * num_bytes <= 256 * 2**20
    assert numbers[0] > numbers[1] > numbers[2] > 0
    doorkeeper.enter("d", 1000)
    doorkeeper.leave("d", 1000)
    for client in taken:
        doorkeeper.leave(client, num_bytes)
    assert [*until_full(doorkeeper, "again", num_bytes)] == ["again"] * numbers[0]
