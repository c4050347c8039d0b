"""How a request leaves the scheduler: at its last token, by an error, aborted."""

from __future__ import annotations

import pytest

from parleyd.generation import FinishReason, Output
from tests.support.scheduling import EOS, TOKEN, Request, entries, keys, request, scheduler, start, step


def test_a_stop_id_ends_with_stop_and_is_delivered() -> None:
    engine = scheduler()
    start(engine, request(1), request(2, stop_token_ids=(9,)), request(3, ignore_eos=True))
    batch = engine.schedule()
    assert batch
    assert engine.commit(batch, [EOS, 9, EOS]) == [
        Output(key=1, token_ids=(EOS,), finish_reason=FinishReason.STOP),
        Output(key=2, token_ids=(9,), finish_reason=FinishReason.STOP),
        Output(key=3, token_ids=(EOS,)),
    ]
    assert engine.stats().num_running == 1


@pytest.mark.parametrize(("num_prompt", "max_new_tokens", "expected"), [(3, 4, 4), (35, 40, 5), (39, 9, 1)])
def test_an_answer_ends_with_length_at_its_limit_or_the_contexts(
    num_prompt: int, max_new_tokens: int, expected: int
) -> None:
    engine = scheduler(tokens=40)
    start(engine, request(1, num_prompt, max_new_tokens=max_new_tokens))
    outputs = [output for _ in range(expected) for output in step(engine)]
    assert [output.finish_reason for output in outputs] == [None] * (expected - 1) + [FinishReason.LENGTH]
    assert engine.is_idle
    assert engine.stats().num_used_blocks == 0


def test_ids_already_delivered_count_but_are_not_delivered_again() -> None:
    engine = scheduler()
    start(engine, request(1, 3, output=(7, 8), max_new_tokens=4))
    assert entries(engine.schedule()) == [(1, 0, 5)]
    engine = scheduler()
    start(engine, request(1, 3, output=(7, 8), max_new_tokens=4))
    assert step(engine, 9) == [Output(key=1, token_ids=(9,))]
    assert step(engine, 10) == [Output(key=1, token_ids=(10,), finish_reason=FinishReason.LENGTH)]


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (request(1, output=(7, EOS)), FinishReason.STOP),
        (request(1, output=(7, 8), max_new_tokens=2), FinishReason.LENGTH),
        (request(1, num_prompt=37, output=(7, 8, 9)), FinishReason.LENGTH),
        (request(1, num_prompt=50), FinishReason.LENGTH),
    ],
)
def test_a_request_with_nothing_left_to_generate_ends_at_once(one: Request, reason: FinishReason) -> None:
    engine = scheduler()
    assert engine.submit(one) == Output(key=1, finish_reason=reason)
    assert engine.is_idle


def test_an_empty_prompt_is_an_error_of_its_own_request() -> None:
    output = scheduler().submit(request(1, prompt=()))
    assert output is not None
    assert output.error


def test_a_key_can_be_open_once_only() -> None:
    engine = scheduler()
    start(engine, request(1))
    with pytest.raises(ValueError, match="already open"):
        engine.submit(request(1))


def test_a_step_that_failed_ends_its_own_requests_only() -> None:
    engine = scheduler(running=2)
    start(engine, request(1), request(2), request(3))
    batch = engine.schedule()
    assert batch
    assert engine.fail(batch, "boom") == [Output(key=1, error="boom"), Output(key=2, error="boom")]
    assert engine.stats().num_used_blocks == 0
    assert keys(step(engine)) == [3]
    engine.check_integrity()


# Abort


def test_an_abort_between_schedule_and_commit_frees_its_blocks_and_drops_its_output() -> None:
    engine = scheduler()
    start(engine, request(1), request(2))
    batch = engine.schedule()
    assert batch
    engine.abort(1)
    assert engine.stats().num_used_blocks == 1
    assert [len(item.block_ids) for item in batch.scheduled] == [1, 1], "the batch can still be run as it was scheduled"
    assert keys(engine.commit(batch, [TOKEN, TOKEN])) == [2]
    engine.abort(2)
    engine.check_integrity()
    assert engine.stats().num_used_blocks == 0


def test_what_an_aborted_sequence_had_not_computed_is_never_found() -> None:
    engine = scheduler(tokens=40)
    prompt = tuple(range(20))
    start(engine, request(1, prompt=prompt))
    batch = engine.schedule()
    engine.abort(1)
    assert batch
    engine.commit(batch, [TOKEN])
    start(engine, request(2, prompt=prompt))
    assert entries(engine.schedule()) == [(2, 0, 20)]


def test_unknown_and_waiting_keys_can_be_aborted() -> None:
    engine = scheduler(running=1)
    start(engine, request(1), request(2), request(3))
    engine.abort(2)
    engine.abort(2)
    engine.abort(99)
    step(engine)
    engine.abort(1)
    assert keys(step(engine)) == [3]


def test_cancelled_waiting_requests_leave_nothing_behind() -> None:
    engine = scheduler(running=1)
    for key in range(1000):
        start(engine, request(key))
    step(engine)
    for key in range(999, 1, -1):
        engine.abort(key)
    assert engine.stats().num_waiting == 1
    assert len(engine._waiting) == 1
