"""Limits of each client: open calls, requests a minute."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parleyd.errors import ClientLimit
from parleyd.security import limits
from parleyd.security.caller import Caller, Rules
from parleyd.security.limits import Limits


class Clock:
    now = 1e6

    def __call__(self) -> float:
        return self.now


def caller(name: str = "key:a", **rules: int) -> Caller:
    return Caller(name, Rules(**rules))  # type: ignore[arg-type]


def test_open_calls_are_counted_by_client() -> None:
    counted = Limits()
    a, b = caller(max_open_calls=2), caller("key:b", max_open_calls=2)
    counted.enter(a, 1)
    counted.enter(a, 1)
    with pytest.raises(ClientLimit) as refused:
        counted.enter(a, 1)
    assert refused.value.retry_after_s == 1.0
    counted.enter(b, 1)
    counted.leave(a)
    counted.enter(a, 1)


@given(rate=st.integers(1, 5000))
def test_a_minutes_requests_may_come_at_once_and_no_more(rate: int) -> None:
    clock = Clock()
    counted = Limits(clock)
    client = caller(requests_per_minute=rate)
    for _ in range(rate):
        counted.enter(client, 1)
    with pytest.raises(ClientLimit) as refused:
        counted.enter(client, 1)
    wait_s = refused.value.retry_after_s
    assert wait_s == pytest.approx(60 / rate, rel=1e-3)
    clock.now += wait_s * 0.9
    with pytest.raises(ClientLimit):
        counted.enter(client, 1)
    clock.now += wait_s * 0.2
    counted.enter(client, 1)


def test_a_client_that_makes_no_requests_saves_none_up() -> None:
    clock = Clock()
    counted = Limits(clock)
    client = caller(requests_per_minute=2)
    counted.enter(client, 1)
    clock.now += 3600
    for _ in range(2):
        counted.enter(client, 1)
    with pytest.raises(ClientLimit):
        counted.enter(client, 1)


def test_a_batch_counts_in_full_and_may_run_up_a_debt() -> None:
    clock = Clock()
    counted = Limits(clock)
    client = caller(requests_per_minute=10)
    counted.enter(client, 100)
    with pytest.raises(ClientLimit) as refused:
        counted.enter(client, 1)
    assert refused.value.retry_after_s == pytest.approx(9.1 * 60)
    clock.now += 9.2 * 60
    counted.enter(client, 1)


def test_refused_calls_cost_nothing() -> None:
    clock = Clock()
    counted = Limits(clock)
    client = caller(requests_per_minute=2, max_open_calls=1)
    counted.enter(client, 1)
    for _ in range(5):
        with pytest.raises(ClientLimit):
            counted.enter(client, 1)
    counted.leave(client)
    counted.enter(client, 1)


def test_clients_that_went_away_are_forgotten_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_SWEEP_AT", 10)
    clock = Clock()
    counted = Limits(clock)
    open_one = caller("key:open", max_open_calls=1)
    counted.enter(open_one, 1)
    in_debt = caller("key:in_debt", requests_per_minute=1)
    counted.enter(in_debt, 100)
    counted.leave(in_debt)
    for i in range(1000):
        client = caller(f"ipv4:10.0.0.{i}", requests_per_minute=60)
        counted.enter(client, 1)
        counted.leave(client)
        clock.now += 1
    assert len(counted._usage) < 30
    for kept in (open_one, in_debt):
        with pytest.raises(ClientLimit):
            counted.enter(kept, 1)


def test_calls_from_before_a_client_had_limits_are_not_counted() -> None:
    counted = Limits()
    counted.enter(caller(), 1)
    counted.leave(caller())
    counted.enter(caller(max_open_calls=1), 1)
