"""The smallest and the largest that a scheduler takes, and that lost requests are noticed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

import pytest

from parleyd.errors import StartupError
from parleyd.generation import FinishReason
from parleyd.scheduling.kv_cache import IntegrityError
from parleyd.scheduling.request import Sequence
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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda one, _: vars(one).update(num_computed_tokens=12), "request 1 has 12 of 4 tokens computed"),
        (lambda one, _: one.token_ids.extend(range(9)) or vars(one).update(num_computed_tokens=12), "into 1 blocks"),
        (lambda one, _: one.token_ids.extend(range(20)), "request 1 has 24 tokens of at most 23"),
        (lambda one, _: vars(one).update(num_pending=1), "request 1 awaits 1 ids from 0 batches"),
        (lambda one, _: vars(one).update(finish_reason=FinishReason.STOP), "request 1 has finished"),
        (lambda _, waiting: vars(waiting).update(num_computed_tokens=1), "request 3 waits, but holds 0 blocks for 1"),
    ],
)
def test_a_request_that_contradicts_itself_is_noticed(
    damage: Callable[[Sequence, Sequence], None], message: str
) -> None:
    engine = scheduler(running=2)
    start(engine, request(1), request(2), request(3))
    step(engine)
    engine.check_integrity()
    damage(engine._running[0], engine._waiting[0])
    with pytest.raises(IntegrityError, match=message):
        engine.check_integrity()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda engine: engine._running[0].block_ids.pop(), "held 0 times but counted 1"),
        (lambda engine: engine._sequences.pop(2), "2 running \\+ 0 waiting requests are not 1"),
        (lambda engine: engine._running.reverse(), "by rank"),
        (lambda engine: vars(engine).update(_max_running=1), "2 sequences run, above the limit of 1"),
    ],
)
def test_a_request_lost_from_the_books_is_noticed(damage: Callable[[Scheduler], object], message: str) -> None:
    engine = scheduler()
    start(engine, request(1), request(2))
    step(engine)
    engine.check_integrity()
    damage(engine)
    with pytest.raises(IntegrityError, match=message):
        engine.check_integrity()
