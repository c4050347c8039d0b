"""What the scheduler runs and in which order, request by request; for everything at once see the properties beside."""

from __future__ import annotations

import pytest

from parleyd.generation import FinishReason, Output
from tests.support.scheduling import BLOCK_SIZE, EOS, TOKEN, entries, keys, request, scheduler, start, step

# Prefill and decode


def test_a_long_prompt_comes_in_chunks_and_samples_with_its_last() -> None:
    engine = scheduler(tokens=16)
    start(engine, request(1, 37))
    seen = []
    for _ in range(4):
        batch = engine.schedule()
        assert batch
        seen.append((*entries(batch)[0][1:], batch.num_samples))
        engine.commit(batch, [TOKEN] * batch.num_samples)
    assert seen == [(0, 16, 0), (16, 16, 0), (32, 5, 1), (37, 1, 1)]


def test_decodes_come_first_and_prompts_get_the_rest_of_the_budget() -> None:
    engine = scheduler(tokens=16)
    start(engine, request(1), request(2))
    step(engine)
    start(engine, request(3, 30), request(4, 5))
    batch = engine.schedule()
    assert entries(batch) == [(1, 3, 1), (2, 3, 1), (3, 0, 14)]
    assert batch
    assert (batch.num_decodes, batch.num_samples, batch.num_tokens) == (2, 2, 16)
    engine.commit(batch, [TOKEN] * 2)
    assert entries(engine.schedule()) == [(1, 4, 1), (2, 4, 1), (3, 14, 14)]


def test_prompt_tokens_beside_decodes_can_be_limited_further() -> None:
    engine = scheduler(tokens=16, mixed=6)
    start(engine, request(1, 14))
    assert entries(engine.schedule()) == [(1, 0, 14)]
    engine = scheduler(tokens=16, mixed=6)
    start(engine, request(1))
    step(engine)
    start(engine, request(2, 4), request(3, 4))
    assert entries(engine.schedule()) == [(1, 3, 1), (2, 0, 4), (3, 0, 2)]


def test_several_short_prompts_share_a_step() -> None:
    engine = scheduler(tokens=16)
    start(engine, *(request(key, 5) for key in (1, 2, 3, 4)))
    assert entries(engine.schedule()) == [(1, 0, 5), (2, 0, 5), (3, 0, 5), (4, 0, 1)]


def test_where_each_prompt_token_costs_as_much_few_prompts_are_done_one_after_the_other() -> None:
    engine = scheduler(400, tokens=300, context=80, mixed=300)
    start(engine, *(request(key, 70) for key in (1, 2, 3, 4)))
    assert [keys(step(engine)) for _ in range(4)] == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]
    engine = scheduler(400, tokens=300, context=80, mixed=300)
    start(engine, *(request(key, 70) for key in range(1, 9)))
    assert keys(step(engine)) == [1, 2]


def test_no_more_run_than_allowed() -> None:
    engine = scheduler(running=2)
    start(engine, request(1, max_new_tokens=1), request(2), request(3))
    assert keys(step(engine)) == [1, 2]
    assert keys(step(engine)) == [2, 3]


# Order


def test_requests_start_by_priority_then_arrival() -> None:
    engine = scheduler(running=1)
    start(
        engine,
        *(request(key, priority=p, max_new_tokens=1) for key, p in enumerate([0, 5, 0, 5, -1, 2**31 - 1])),
    )
    assert [step(engine)[0].key for _ in range(6)] == [5, 1, 3, 0, 2, 4]


def test_a_higher_priority_prompt_goes_before_one_already_begun() -> None:
    engine = scheduler(tokens=8)
    start(engine, request(1, 20))
    step(engine)
    start(engine, request(2, 6, priority=1), request(3, 6))
    assert entries(engine.schedule()) == [(2, 0, 6), (1, 8, 2)]


def test_nobody_passes_a_waiting_request_that_does_not_fit_yet() -> None:
    engine = scheduler(num_blocks=10)
    start(engine, request(1, 12))
    step(engine)
    start(engine, request(2, 36), request(3, 1))
    for _ in range(10):
        assert keys(step(engine)) == [1]
    engine.abort(1)
    assert entries(engine.schedule()) == [(2, 0, 16)]


def test_a_newcomer_leaves_each_running_sequence_a_block_to_grow_by() -> None:
    engine = scheduler(num_blocks=10)
    start(engine, request(1, 13))
    step(engine)
    start(engine, request(2, 24))
    step(engine)
    assert engine.stats().num_running == 1, "4 + 6 blocks would leave none"
    engine.abort(2)
    start(engine, request(3, 20))
    step(engine)
    assert engine.stats().num_running == 2


# Two batches in flight


def test_a_batch_can_be_scheduled_before_the_one_ahead_is_committed() -> None:
    engine = scheduler()
    start(engine, request(1, 3), request(2, 20, max_new_tokens=1))
    first, second = engine.schedule(), engine.schedule()
    assert first
    assert second
    assert entries(second) == [(1, 3, 1), (2, 13, 7)]
    assert [item.awaits_id for item in second.scheduled] == [True, False]
    assert list(second.token_ids())[:2] == [0, 2013]
    assert engine.commit(first, [11]) == [Output(key=1, token_ids=(11,))]
    assert keys(engine.commit(second, [12, 13])) == [1, 2]
    engine.check_integrity()


def test_an_id_sampled_after_the_end_is_dropped() -> None:
    engine = scheduler()
    start(engine, request(1))
    first, second = engine.schedule(), engine.schedule()
    assert first
    assert second
    assert engine.commit(first, [EOS])[0].is_last
    assert engine.commit(second, [TOKEN]) == []
    engine.check_integrity()


def test_nothing_is_scheduled_past_the_last_token() -> None:
    engine = scheduler()
    start(engine, request(1, max_new_tokens=1))
    first = engine.schedule()
    assert engine.schedule() is None
    assert first
    assert engine.commit(first, [TOKEN])[0].finish_reason is FinishReason.LENGTH


# Prefix cache


def test_cached_prompt_tokens_are_known_from_admission_on() -> None:
    engine = scheduler(tokens=40)
    prompt = tuple(range(20))
    start(engine, request(1, prompt=prompt))
    step(engine)
    start(engine, request(2, prompt=(*prompt, 99)), request(3, prompt=prompt, salt="tenant"))
    batch = engine.schedule()
    assert entries(batch) == [(1, 20, 1), (2, 20, 1), (3, 0, 20)]
    assert batch
    assert [item.sequence.cached_prompt_tokens for item in batch.scheduled] == [0, 20, 0]
    stats = engine.stats()
    assert (stats.num_prompt_tokens, stats.num_cached_prompt_tokens) == (61, 20)


@pytest.mark.parametrize("num_prompt", [2, 4, 11])
def test_a_prompt_is_computed_once_for_all_that_share_it(num_prompt: int) -> None:
    engine = scheduler(tokens=40)
    prompt = tuple(range(num_prompt))
    start(engine, request(1, prompt=prompt))
    step(engine)
    start(engine, request(2, prompt=prompt), request(3, prompt=prompt))
    batch = engine.schedule()
    assert entries(batch) == [(1, num_prompt, 1), (2, num_prompt - 1, 1), (3, num_prompt - 1, 1)]
    assert batch
    last_blocks = [item.block_ids[(num_prompt - 1) // BLOCK_SIZE] for item in batch.scheduled]
    num_copied = (num_prompt - 1) % BLOCK_SIZE
    assert batch.copies == [(last_blocks[0], last_blocks[1], num_copied), (last_blocks[0], last_blocks[2], num_copied)]
    assert [item.sequence.cached_prompt_tokens for item in batch.scheduled] == [0, num_prompt - 1, num_prompt - 1]
    engine.check_integrity()


def test_a_prompt_in_flight_is_not_shared_before_it_is_computed() -> None:
    engine = scheduler(tokens=40)
    prompt = tuple(range(6))
    start(engine, request(1, prompt=prompt))
    first = engine.schedule()
    start(engine, request(2, prompt=prompt))
    second = engine.schedule()
    assert first and second
    assert (entries(second)[-1], second.copies) == ((2, 0, 6), [])


def test_the_next_turn_of_a_conversation_finds_the_answer_too() -> None:
    engine = scheduler(tokens=40)
    start(engine, request(1, prompt=tuple(range(6)), max_new_tokens=7))
    for _ in range(7):
        step(engine)
    start(engine, request(2, prompt=(*range(6), *[TOKEN] * 7, 50, 51)))
    batch = engine.schedule()
    assert entries(batch) == [(2, 12, 3)]


# Plain data for a model runner


def test_a_batch_tells_ids_and_positions_end_to_end() -> None:
    engine = scheduler(tokens=8)
    start(engine, request(1, 3))
    step(engine)
    start(engine, request(2, 9))
    batch = engine.schedule()
    assert batch
    assert list(batch.token_ids()) == [TOKEN, *range(2000, 2007)]
    assert list(batch.positions()) == [3, *range(7)]


def test_commit_wants_one_id_for_each_that_samples() -> None:
    engine = scheduler()
    start(engine, request(1))
    batch = engine.schedule()
    assert batch
    with pytest.raises(ValueError, match="2 ids for 1"):
        engine.commit(batch, [TOKEN, TOKEN])
