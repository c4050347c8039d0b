"""In which steps a call waits for a service in trouble."""

from __future__ import annotations

import pytest

from parley_client import ConnectionFailed, DeadlineExceeded, Draining, QueueFull, Unavailable
from parley_client.health import ReadinessWait
from parley_client.patience import Contact, Patience


def test_delays_are_bounded_however_many_calls_have_failed():
    patience = Patience(lambda timeout: {}, None, 2_000, Contact())
    delays = [patience.delay_after(Unavailable("as told")) for _ in range(2_001)]
    assert 0 < delays[0] < 0.2
    assert all(4 <= delay <= 6 for delay in delays[6:-1])
    assert delays[-1] is None


def test_an_expired_try_tells_why_it_was_not_the_first_also_where_no_server_has_ever_answered():
    patience = Patience(lambda timeout: {}, 1, 0, Contact(), num_retries=2)
    assert patience.delay_before_again(ConnectionFailed("nobody there")) is not None
    expired = DeadlineExceeded("too late")
    assert patience.delay_before_again(expired) is None
    assert expired.__notes__ == ["before that: nobody there"]


def test_an_expired_try_tells_nothing_of_what_was_before_an_answer_went_on():
    patience = Patience(lambda timeout: {}, 1, 1, Contact())
    assert patience.delay_after(Unavailable("gone")) is not None
    patience.note_progress()
    expired = DeadlineExceeded("too late")
    assert patience.delay_after(expired) is None
    assert not hasattr(expired, "__notes__")


def test_a_full_queue_is_waited_for_only_by_who_has_lost_a_server():
    patience = Patience(lambda timeout: {}, None, 2, Contact())
    full = QueueFull("no room")
    assert patience.delay_after(full) is None
    assert patience.delay_after(Unavailable("gone")) is not None
    assert patience.delay_after(full) is not None


def test_a_server_that_says_when_it_is_back_is_called_then_but_within_the_timeout():
    draining = Draining("going", retry_after_s=7)
    assert Patience(lambda timeout: {}, None, 1, Contact()).delay_after(draining) == 7
    assert Patience(lambda timeout: {}, 1, 1, Contact()).delay_after(draining) <= 1


def test_waiting_for_readiness_in_vain_tells_what_the_last_watch_failed_of():
    wait = ReadinessWait(0)
    wait.saw_error(ConnectionFailed("no upstream"))
    with pytest.raises(DeadlineExceeded, match=r"^not ready within 0 s: no upstream$"):
        wait.remaining_s()
