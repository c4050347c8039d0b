"""How many calls may be open, and that no client has all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from parleyd.errors import QueueFull
from parleyd.gateway.doorkeeper import Doorkeeper


def until_full(doorkeeper: Doorkeeper, client: str) -> Iterator[str]:
    while True:
        try:
            doorkeeper.enter(client)
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
    with pytest.raises(QueueFull):
        doorkeeper.enter("c")
