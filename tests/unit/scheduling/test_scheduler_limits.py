"""The smallest and the largest that a scheduler takes, and that lost requests are noticed."""

from __future__ import annotations

import sys
from types import FrameType

import pytest

from parleyd.errors import StartupError
from parleyd.scheduling.kv_cache import IntegrityError
from parleyd.scheduling.scheduler import Scheduler
from tests.support.scheduling import request, scheduler, start, step


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"num_blocks": 9, "context": 40}, "holds 36 tokens, but one full context takes 40"),
        ({"running": 20, "tokens": 16}, "a step of 16 tokens"),
        ({"running": 0}, "each of 0"),
    ],
)
def test_limits_that_could_never_work_are_refused_at_start(limits: dict[str, int], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        scheduler(**limits)


def test_one_sequence_of_the_full_context_fits_the_smallest_cache() -> None:
    engine = scheduler(num_blocks=10, context=40)
    start(engine, request(1, 30, max_new_tokens=100))
    while not engine.is_idle:
        step(engine)
        engine.check_integrity()
    assert engine.stats().num_generated_tokens == 10


def num_calls(engine: Scheduler) -> int:
    """Python and C functions called in one step."""
    count = 0

    def on_event(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(on_event)
    try:
        step(engine)
    finally:
        sys.setprofile(None)
    return count


def test_ten_thousand_waiting_requests_cost_a_step_nothing() -> None:
    quiet, crowded = scheduler(running=4), scheduler(running=4)
    for engine, num_requests in ((quiet, 4), (crowded, 10_000)):
        start(engine, *(request(key) for key in range(num_requests)))
        step(engine)
        engine.check_integrity()
    assert num_calls(crowded) <= num_calls(quiet) + 5


def test_a_request_lost_from_the_books_is_noticed() -> None:
    engine = scheduler()
    start(engine, request(1), request(2))
    step(engine)
    engine.check_integrity()
    engine._running[0].num_computed_tokens += 9
    with pytest.raises(IntegrityError, match="request 1 has 12 of 4 tokens computed"):
        engine.check_integrity()
    engine._running[0].num_computed_tokens -= 9
    del engine._sequences[2]
    with pytest.raises(IntegrityError, match="are not 1"):
        engine.check_integrity()
